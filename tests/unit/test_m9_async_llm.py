"""AsyncLLM over a fake core, in its own process and in a thread: LLMEngine's outputs, and nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from folovllm import SamplingParams
from folovllm.engine import async_llm
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.protocol import EngineClient, EngineDeadError
from folovllm.engine.serial import StepOutputs
from folovllm.metrics.loggers import StatLoggerBase
from folovllm.metrics.stats import IterationStats, SchedulerStats
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import RequestOutputKind
from tests.fake_engine import BAD_ID, CRASH_TOKEN, STEP_SECONDS, TOKENIZER, fake_async_llm, fake_llm_engine

TIMEOUT_S = 30.0
PROMPT = "hello world and the"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (PROMPT, {"max_tokens": 40}),
    "ids": ({"prompt_token_ids": [5, 6, 7], "cache_salt": "salt"}, {"max_tokens": 9}),
    "n": (PROMPT, {"max_tokens": 12, "n": 3, "seed": 1}),
    "logprobs": (PROMPT, {"max_tokens": 6, "logprobs": 3}),
    "all logprobs": ("a b", {"max_tokens": 3, "logprobs": -1}),
    "prompt logprobs": (PROMPT, {"max_tokens": 5, "prompt_logprobs": 2}),
    "n prompt logprobs": (PROMPT, {"max_tokens": 5, "prompt_logprobs": 2, "n": 2, "seed": 3}),
    "no text": (PROMPT, {"max_tokens": 8, "detokenize": False}),
}


class Recorder(StatLoggerBase):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.scheduler_stats: list[SchedulerStats] = []
        self.iteration_stats: list[IterationStats] = []

    def record(self, scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None) -> None:
        assert iteration_stats is not None
        self.iteration_stats.append(iteration_stats)
        if scheduler_stats is not None:  # an abort is counted at once, between two steps
            self.scheduler_stats.append(scheduler_stats)

    def log(self) -> None:
        """Nothing to do."""


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that must end in time, and must leave no task."""

    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, TIMEOUT_S)

    return asyncio.run(limited())


@pytest.fixture(params=["process", "thread"], scope="module")
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def engine(mode: str, recorder: Recorder) -> Iterator[AsyncLLM]:
    """One engine for all tests that leave it as it was; each test runs its own event loop."""
    gc.unfreeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STEP_SECONDS, "0.002")
        args = EngineArgs(
            model="fake", max_model_len=512, num_gpu_blocks_override=400, max_logprobs=-1, disable_log_stats=False
        )
        engine = fake_async_llm(args, in_process=mode == "thread", stat_loggers=[recorder])
    yield engine
    assert engine.num_unfinished_requests() == 0
    run(engine.shutdown())
    gc.unfreeze()


async def collect(engine: EngineClient, prompt: Any, params: SamplingParams, request_id: str) -> list[RequestOutput]:
    """Return every output of a request."""
    return [output async for output in engine.generate(prompt, params, request_id)]


def merge_deltas(outputs: list[RequestOutput]) -> RequestOutput:
    """Return one output that says what the stream said."""
    merged = outputs[0]
    for output in outputs[1:]:
        merged.add(output, aggregate=True)
    merged.outputs.sort(key=lambda sample: sample.index)
    return merged


def comparable(output: RequestOutput) -> tuple[Any, ...]:
    """Return all that must be equal."""
    samples = [
        (s.index, s.text, list(s.token_ids), s.cumulative_logprob, s.logprobs, s.finish_reason, s.stop_reason)
        for s in output.outputs
    ]
    return (output.prompt, output.prompt_token_ids, output.prompt_logprobs or None, sorted(samples))


def offline(prompt: Any, params: SamplingParams) -> RequestOutput:
    """Return the last output of the synchronous engine."""
    engine = fake_llm_engine(EngineArgs(model="fake", max_model_len=512, max_logprobs=-1))
    params = params.clone()
    params.output_kind = RequestOutputKind.FINAL_ONLY
    engine.add_request("0", prompt, params)
    outputs: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    engine.shutdown()
    (output,) = outputs
    return output


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`."""
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_synchronous_engine(engine: AsyncLLM, case: str, kind: RequestOutputKind) -> None:
    prompt, args = CASES[case]
    params = SamplingParams(output_kind=kind, **args)
    outputs = run(collect(engine, prompt, params, f"{case}-{kind.name}"))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    expected = offline(prompt, params)
    if kind == RequestOutputKind.FINAL_ONLY:
        assert len(outputs) == 1
    if kind == RequestOutputKind.DELTA:
        outputs = [merge_deltas(outputs)]
    if kind == RequestOutputKind.CUMULATIVE and params.n > 1:
        outputs = [merge_cumulative(outputs)]
    assert comparable(outputs[-1]) == comparable(expected)


def merge_cumulative(outputs: list[RequestOutput]) -> RequestOutput:
    """Return the last word of each sample: an output has only the samples with news."""
    merged = outputs[0]
    for output in outputs[1:]:
        merged.add(output, aggregate=False)
    return merged


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_request_here_and_in_the_core(
    engine: AsyncLLM, recorder: Recorder, include: bool
) -> None:
    whole = offline(PROMPT, SamplingParams(max_tokens=60)).outputs[0].text
    stop = whole[30:33]
    steps_before = len(recorder.scheduler_stats)
    params = SamplingParams(max_tokens=400, stop=[stop], include_stop_str_in_output=include)
    expected = offline(PROMPT, params)
    assert expected.outputs[0].stop_reason == stop

    async def check() -> RequestOutput:
        outputs = await collect(engine, PROMPT, params, "stop")
        await until(lambda: recorder.scheduler_stats[-1].kv_cache_usage == 0.0)
        return outputs[-1]

    assert comparable(run(check())) == comparable(expected)
    assert len(recorder.scheduler_stats) - steps_before < 150


def test_a_crowd_with_cancellations_gets_its_outputs_and_frees_every_block(
    engine: AsyncLLM, recorder: Recorder
) -> None:
    rng = random.Random(0)
    steps_before = len(recorder.scheduler_stats)

    async def client(i: int) -> None:
        prompt = f"{i} hello"
        outputs: list[RequestOutput] = []
        give_up_at = rng.choice([None, 1, 5, 20])
        max_tokens = 60 if give_up_at is None else 450
        params = SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)
        stream = engine.generate(prompt, params, f"crowd-{i}")
        async with contextlib.aclosing(stream):
            async for output in stream:
                outputs.append(output)
                if give_up_at is not None and len(outputs) >= give_up_at:
                    return
        assert comparable(merge_deltas(outputs)) == comparable(offline(prompt, params)), prompt

    async def crowd() -> None:
        tasks = [asyncio.create_task(client(i)) for i in range(50)]
        await asyncio.sleep(0.05)
        for task in rng.sample(tasks, 10):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [r for r in results if isinstance(r, Exception) and not isinstance(r, asyncio.CancelledError)]
        assert not errors
        assert engine.num_unfinished_requests() == 0
        await until(lambda: recorder.scheduler_stats[-1].kv_cache_usage == 0.0)
        assert (recorder.scheduler_stats[-1].num_running_reqs, recorder.scheduler_stats[-1].num_waiting_reqs) == (0, 0)

    run(crowd())
    assert len(recorder.scheduler_stats) - steps_before < 350  # the core did not finish what nobody reads


def test_abort_ends_a_stream_with_its_last_output(engine: AsyncLLM, recorder: Recorder) -> None:
    steps_before = len(recorder.scheduler_stats)

    async def check() -> None:
        params = SamplingParams(max_tokens=400, n=2, seed=0)
        task = asyncio.create_task(collect(engine, PROMPT, params, "long"))
        other = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=50), "other"))
        await asyncio.sleep(0.05)
        assert engine.num_unfinished_requests() == 2
        await engine.abort(["long", "nobody"])
        assert {sample.finish_reason for sample in (await task)[-1].outputs} == {"abort"}
        assert (await other)[-1].outputs[0].finish_reason == "length"
        await until(lambda: recorder.scheduler_stats[-1].kv_cache_usage == 0.0)

    run(check())
    assert len(recorder.scheduler_stats) - steps_before < 200


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", SamplingParams(), "prompt is empty"),
        (PROMPT, SamplingParams(min_tokens=600, max_tokens=600), "min_tokens=600"),
        (PROMPT, SamplingParams(max_tokens=10**30), "cannot be sent"),
        ({"prompt_token_ids": [5], "cache_salt": "\ud800"}, SamplingParams(), "cannot be sent"),
        ([5] * 600, SamplingParams(), "600 tokens"),
    ],
)
def test_a_bad_request_is_refused_before_it_is_queued_and_disturbs_nobody(
    mode: str, engine: AsyncLLM, prompt: Any, params: SamplingParams, message: str
) -> None:
    if mode == "thread" and "sent" in message:
        pytest.skip("nothing is encoded")

    async def check() -> None:
        good = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=30), "good"))
        await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match=message):
            await collect(engine, prompt, params, "refused")
        assert engine.num_unfinished_requests() == 1
        assert (await good)[-1].outputs[0].finish_reason == "length"

    run(check())


def test_a_prompt_that_can_never_fit_is_refused_before_it_is_queued() -> None:
    args = EngineArgs(model="fake", max_model_len=64, num_gpu_blocks_override=5)
    engine = fake_async_llm(args, in_process=True)

    async def check() -> None:
        engine.core_client.ready.num_blocks = 3
        with pytest.raises(ValueError, match=r"needs 3 KV cache blocks.*the cache has 2"):
            await collect(engine, [5] * 40, SamplingParams(), "big")
        await engine.shutdown()

    run(check())


def test_an_id_in_use_is_refused_and_may_be_used_again_later(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        first = engine.generate(PROMPT, SamplingParams(max_tokens=100), "same")
        await anext(first)
        with pytest.raises(ValueError, match="'same' belongs to a request"):
            await collect(engine, PROMPT, SamplingParams(), "same")
        await anext(first)
        await first.aclose()
        assert len(await collect(engine, PROMPT, SamplingParams(max_tokens=5), "same")) >= 1
        monkeypatch.setattr(async_llm, "LONG_PROMPT_CHARS", 1)
        both = [asyncio.create_task(collect(engine, PROMPT, SamplingParams(), "same")) for _ in range(2)]
        results = await asyncio.gather(*both, return_exceptions=True)
        assert [type(result) for result in results] == [list, ValueError]

    run(check())


def test_closing_a_finished_stream_late_does_not_end_the_next_request_of_that_id(engine: AsyncLLM) -> None:
    async def check() -> None:
        old = engine.generate(PROMPT, SamplingParams(max_tokens=1), "id")
        assert (await anext(old)).finished
        new = engine.generate(PROMPT, SamplingParams(max_tokens=40), "id")
        await anext(new)
        await old.aclose()
        outputs = [output async for output in new]
        assert outputs[-1].outputs[0].finish_reason == "length"

    run(check())


def test_a_request_that_the_core_cannot_add_fails_alone(engine: AsyncLLM) -> None:
    async def check() -> None:
        good = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=30), "good"))
        with pytest.raises(RuntimeError, match="could not queue"):
            await collect(engine, PROMPT, SamplingParams(n=2, seed=1), BAD_ID)
        assert (await good)[-1].outputs[0].finish_reason == "length"
        assert engine.num_unfinished_requests() == 0 and not engine.errored
        await engine.check_health()

    run(check())


def test_a_slow_reader_gets_merged_outputs_and_holds_up_nobody(engine: AsyncLLM) -> None:
    params = SamplingParams(max_tokens=60, output_kind=RequestOutputKind.DELTA)

    async def slow() -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate(PROMPT, params, "slow"):
            outputs.append(output)
            await asyncio.sleep(0.2)
        return outputs

    async def check() -> None:
        task = asyncio.create_task(slow())
        fast = await collect(engine, "other", params, "fast")
        assert not task.done()
        slow_outputs = await task
        assert len(slow_outputs) < 10 < len(fast)
        assert comparable(merge_deltas(slow_outputs)) == comparable(offline(PROMPT, params))

    run(check())


def test_a_long_prompt_is_tokenized_beside_the_event_loop(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    process = engine.processor.process_inputs

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2.0)
        return process(*args, **kwargs)

    monkeypatch.setattr(engine.processor, "process_inputs", slow)
    monkeypatch.setattr(async_llm, "LONG_PROMPT_CHARS", len(PROMPT))

    async def check() -> None:
        task = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=3), "long"))
        started = time.monotonic()
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert time.monotonic() - started < 1.0
        assert engine.num_unfinished_requests() == 1
        assert comparable((await task)[-1]) == comparable(offline(PROMPT, SamplingParams(max_tokens=3)))

    run(check())


def test_a_big_step_lets_other_tasks_run_between_its_chunks(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "OUTPUT_CHUNK_SIZE", 2)
    sizes: list[int] = []
    process = engine.output_processor.process_outputs

    def spy(outputs: list[Any], *args: Any) -> Any:
        sizes.append(len(outputs))
        return process(outputs, *args)

    monkeypatch.setattr(engine.output_processor, "process_outputs", spy)

    async def check() -> None:
        tasks = [collect(engine, f"{i}", SamplingParams(max_tokens=20), f"chunk-{i}") for i in range(7)]
        for outputs in await asyncio.gather(*tasks):
            assert len(outputs[-1].outputs[0].token_ids) == 20

    run(check())
    assert max(sizes) == 2


def test_steps_that_wait_become_one_output(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine ahead of the front: 20 steps at once come as outputs of 8, 8 and 4 tokens, not as 20."""
    deliver, held = engine._on_message, []

    def hold(message: Any) -> None:
        if not isinstance(message, StepOutputs) or not message.outputs.outputs:  # the end of an earlier test's step
            deliver(message)
            return
        held.append(message)
        if any(output.finish_reason for output in message.outputs.outputs):
            for each in held:
                deliver(each)

    monkeypatch.setattr(engine, "_on_message", hold)

    async def check() -> None:
        params = SamplingParams(max_tokens=20, output_kind=RequestOutputKind.DELTA)
        outputs = await collect(engine, PROMPT, params, "0")
        assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8, 4]
        tokens = [token for output in outputs for token in output.outputs[0].token_ids]
        assert tokens == offline(PROMPT, SamplingParams(max_tokens=20)).outputs[0].token_ids

    run(check())


def test_stream_interval_merges_tokens() -> None:
    engine = fake_async_llm(in_process=True, stream_interval=5)

    async def check() -> None:
        params = SamplingParams(max_tokens=21, output_kind=RequestOutputKind.DELTA)
        outputs = await collect(engine, PROMPT, params, "0")
        assert len(outputs) <= 5
        assert comparable(merge_deltas(outputs)) == comparable(offline(PROMPT, params))
        await engine.shutdown()

    run(check())


def test_statistics_reach_the_loggers_and_a_failing_logger_is_dropped(
    engine: AsyncLLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Recorder):
        calls = 0

        def record(self, *args: Any) -> None:
            Failing.calls += 1
            raise KeyError("broken")

    monkeypatch.setattr(engine, "stat_loggers", [Failing(), recorder])
    before, steps_before = len(recorder.iteration_stats), len(recorder.scheduler_stats)

    async def check() -> None:
        outputs = await collect(engine, PROMPT, SamplingParams(max_tokens=25, n=2, seed=5), "stats")
        assert outputs[-1].metrics is not None
        await until(lambda: recorder.scheduler_stats[-1].kv_cache_usage == 0.0)

    run(check())
    stats = recorder.iteration_stats[before:]
    assert sum(s.num_generation_tokens for s in stats) == 50
    assert sum(len(s.finished_requests) for s in stats) == 2
    assert [n for s in stats for n in s.n_params_iter] == [2]
    assert max(s.num_running_reqs for s in recorder.scheduler_stats[steps_before:]) == 2
    assert Failing.calls == 1


def test_the_prefix_cache_can_be_reset_when_idle(engine: AsyncLLM) -> None:
    async def check() -> None:
        prompt = list(range(10, 50))
        params = SamplingParams(max_tokens=2)
        await engine.reset_prefix_cache()
        assert (await collect(engine, prompt, params, "0"))[-1].num_cached_tokens == 0
        assert (await collect(engine, prompt, params, "1"))[-1].num_cached_tokens == 32
        stream = engine.generate(prompt, SamplingParams(max_tokens=100), "2")
        await anext(stream)
        assert await engine.reset_prefix_cache() is False
        await stream.aclose()
        assert await engine.reset_prefix_cache() is True
        assert (await collect(engine, prompt, params, "3"))[-1].num_cached_tokens == 0

    run(check())


def test_one_event_loop_at_a_time(engine: AsyncLLM) -> None:
    async def outer() -> None:
        await engine.check_health()

        async def inner() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                await engine.check_health()

        await asyncio.to_thread(asyncio.run, inner())

    run(outer())


def test_a_failed_step_ends_every_stream_with_an_error(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP_SECONDS, "0.005")
    engine = fake_async_llm(in_process=mode == "thread")

    async def check() -> None:
        tasks = [
            asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=4000), str(i))) for i in range(5)
        ]
        death = asyncio.create_task(engine.wait_dead())
        await asyncio.sleep(0.1)
        assert engine.is_running and not engine.errored and not death.done()
        with pytest.raises(EngineDeadError, match="the crash that the test asked for"):
            await collect(engine, [5, CRASH_TOKEN], SamplingParams(), "crash")
        for task in tasks:
            with pytest.raises(EngineDeadError):
                await task
        await death
        assert engine.errored and not engine.is_running
        for call in (engine.check_health(), engine.reset_prefix_cache(), collect(engine, PROMPT, SamplingParams(), "")):
            with pytest.raises(EngineDeadError):
                await call
        await engine.abort("1")
        assert engine.num_unfinished_requests() == 0
        await engine.shutdown()

    run(check())


def test_a_dead_engine_holds_no_requests(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loggers may outlive it, where the server starts another engine: gauges must not stay as they were."""
    monkeypatch.setenv(STEP_SECONDS, "0.005")
    recorder = Recorder()
    args = EngineArgs(model="fake", max_model_len=512, disable_log_stats=False)
    engine = fake_async_llm(args, in_process=mode == "thread", stat_loggers=[recorder])

    async def check() -> None:
        params = SamplingParams(max_tokens=4000, n=2, seed=1)
        tasks = [asyncio.create_task(collect(engine, PROMPT, params, str(i))) for i in range(3)]
        await asyncio.sleep(0.1)
        assert any(stats.num_running_reqs == 6 for stats in recorder.scheduler_stats)
        with pytest.raises(EngineDeadError):
            await collect(engine, [5, CRASH_TOKEN], SamplingParams(), "crash")
        assert all(isinstance(error, EngineDeadError) for error in await asyncio.gather(*tasks, return_exceptions=True))
        await asyncio.sleep(0.05)
        assert recorder.scheduler_stats[-1] == SchedulerStats()
        ended = [str(item.finish_reason) for stats in recorder.iteration_stats for item in stats.finished_requests]
        assert ended == ["error"] * 7
        await engine.shutdown()

    run(check())


def test_shutdown_waits_for_running_requests_and_takes_no_new_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP_SECONDS, "0.005")
    engine = fake_async_llm(in_process=mode == "thread")

    async def check() -> None:
        task = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=60), "0"))
        await asyncio.sleep(0.02)
        stop = asyncio.create_task(engine.shutdown(timeout_s=20.0))
        await asyncio.sleep(0.01)
        assert not engine.is_running
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(engine, PROMPT, SamplingParams(), "1")
        assert (await task)[-1].outputs[0].finish_reason == "length"
        await stop
        await engine.shutdown()
        assert not engine.errored

    run(check())


def test_shutdown_aborts_what_does_not_end_in_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP_SECONDS, "0.01")
    engine = fake_async_llm(in_process=mode == "thread")

    async def check() -> None:
        task = asyncio.create_task(collect(engine, PROMPT, SamplingParams(max_tokens=4000), "0"))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        slow = asyncio.create_task(engine.shutdown(timeout_s=100.0))
        await asyncio.sleep(0.05)
        assert not slow.done()
        await engine.shutdown(timeout_s=0.1)  # in more of a hurry
        assert time.monotonic() - started < 5.0
        await slow
        assert (await task)[-1].outputs[0].finish_reason == "abort"

    run(check())


def test_the_tokenizer_and_defaults_are_the_models(engine: AsyncLLM) -> None:
    assert engine.tokenizer is TOKENIZER
    assert engine.get_default_sampling_params() == SamplingParams()
    assert "Engine ready." in engine.startup_report
