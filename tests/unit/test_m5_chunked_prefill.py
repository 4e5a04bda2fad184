"""Chunked prefill: a long prompt takes what the budget leaves, and nobody who decodes waits for it.

The scheduler's side with a fake model that checks every slot it reads; prompt log probabilities with a tiny real one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.outputs import RequestOutput
from tests.core_utils import FakeEngine, create_scheduler, expected_tokens, make_output, make_request
from tests.tiny_models import VOCAB_SIZE, save_tiny_model


def make_engine(use_async: bool = False, **scheduler_args: Any) -> FakeEngine:
    return FakeEngine(create_scheduler(use_async=use_async, **scheduler_args), depth=int(use_async))


def tokens_per_step(engine: FakeEngine, num_steps: int) -> list[dict[str, int]]:
    """Step, and return for every step how many tokens each request got in it."""
    history = []
    for _ in range(num_steps):
        before = {request_id: len(tokens) for request_id, tokens in engine.outputs.items()}
        engine.step()
        engine.scheduler.kv_cache_manager.check_integrity()
        history.append({request_id: len(t) - before[request_id] for request_id, t in engine.outputs.items()})
    return history


# --- chunks ---


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 32, 33, 100])
def test_a_prompt_is_cut_into_budgets_and_sampled_at_its_last_chunk(num_tokens: int, use_async: bool) -> None:
    engine = make_engine(use_async, max_num_batched_tokens=16, max_num_seqs=4)
    request = make_request("r", range(num_tokens), max_tokens=3, ignore_eos=True)
    engine.add(request)
    chunks = [min(16, num_tokens - start) for start in range(0, num_tokens, 16)]
    for i, chunk in enumerate(chunks):
        assert engine.outputs["r"] == [], "a token before the last chunk"
        assert engine.step().num_scheduled_tokens == {"r": chunk}
        _, sampled = engine.in_flight[-1] if use_async else (None, None)
        if sampled is not None:
            assert bool(sampled.sampled_token_ids[0]) == (i == len(chunks) - 1)
    engine.run()
    assert engine.outputs["r"] == expected_tokens(request, 8192)


@pytest.mark.parametrize("use_async", [False, True])
def test_the_threshold_caps_every_chunk_and_leaves_room_for_others(use_async: bool) -> None:
    engine = make_engine(use_async, max_num_batched_tokens=64, max_num_seqs=8, long_prefill_token_threshold=10)
    engine.add(make_request("long", range(95), ignore_eos=True), make_request("short", range(9), ignore_eos=True))
    steps = [engine.step().num_scheduled_tokens for _ in range(10)]
    assert [s["long"] for s in steps] == [10] * 9 + [5]
    assert steps[0]["short"] == 9, "a short prompt starts beside the long one, not behind it"
    assert all(s["short"] == 1 for s in steps[1:])


def test_without_a_threshold_a_long_prompt_takes_the_whole_budget() -> None:
    """What the threshold is for."""
    engine = make_engine(max_num_batched_tokens=64, max_num_seqs=8)
    engine.add(make_request("long", range(150)), make_request("short", range(9)))
    steps = [engine.step().num_scheduled_tokens for _ in range(3)]
    assert steps == [{"long": 64}, {"long": 64}, {"long": 22, "short": 9}]


def test_chunks_and_decodes_share_a_step() -> None:
    engine = make_engine(max_num_batched_tokens=32, max_num_seqs=8)
    engine.add(*(make_request(f"d{i}", [i], max_tokens=50, ignore_eos=True) for i in range(5)))
    engine.step()
    engine.add(make_request("long", range(60), ignore_eos=True))
    decodes = {f"d{i}": 1 for i in range(5)}
    assert [engine.step().num_scheduled_tokens for _ in range(4)] == [
        decodes | {"long": 27},
        decodes | {"long": 27},
        decodes | {"long": 6},
        decodes | {"long": 1},
    ]


# --- fairness ---


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("threshold", [0, 6])
def test_one_long_prompt_per_step_and_every_running_request_gets_its_token(threshold: int, use_async: bool) -> None:
    """The gap between two tokens of a request is one step from its first token to its last, prompts of 150 or not."""
    engine = make_engine(
        use_async, max_num_batched_tokens=24, max_num_seqs=8, long_prefill_token_threshold=threshold, num_blocks=2000
    )
    engine.add(*(make_request(f"d{i}", [i, i + 1], max_tokens=80, ignore_eos=True) for i in range(3)))
    history = []
    for i in range(120):
        engine.add(make_request(f"long{i}", [i % 90] * 150, max_tokens=6, ignore_eos=True))
        history += tokens_per_step(engine, 1)
    check_gaps(engine, history)
    assert all(len(engine.outputs[f"d{i}"]) == 80 for i in range(3))
    assert sum(f"long{i}" in engine.finished for i in range(120)) > 10, "the long ones advance too"


@pytest.mark.parametrize("seed", range(12))
def test_gaps_are_one_step_whatever_arrives(seed: int) -> None:
    """Random budgets, thresholds, lengths and arrivals; the pool is large, so that nobody is preempted."""
    rng = random.Random(seed)
    max_num_seqs = rng.randint(2, 10)
    engine = make_engine(
        bool(seed % 2),
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 30),
        max_num_seqs=max_num_seqs,
        long_prefill_token_threshold=rng.choice([0, 1, 3, 10]),
        enable_prefix_caching=rng.random() < 0.5,
        block_size=4,
        num_blocks=5000,
    )
    history, requests = [], []
    for i in range(80):
        if rng.random() < 0.6:
            prompt = [rng.randrange(3)] * rng.choice([1, 2, 5, 20, 120])
            requests.append(make_request(f"r{i}", prompt, block_size=4, max_tokens=rng.randint(1, 30), ignore_eos=True))
            engine.add(requests[-1])
        history += tokens_per_step(engine, 1)
    check_gaps(engine, history)
    assert engine.scheduler._num_preemptions == 0
    engine.run(max_steps=4000, check=False)
    for request in requests:
        assert engine.outputs[request.request_id] == expected_tokens(request, 8192)


def check_gaps(engine: FakeEngine, history: list[dict[str, int]]) -> None:
    """From the step of its first token to that of its last, a request gets exactly one token per step."""
    for request_id, tokens in engine.outputs.items():
        got = [step.get(request_id, 0) for step in history]
        if not tokens:
            continue
        first = next(i for i, n in enumerate(got) if n)
        last = max(i for i, n in enumerate(got) if n)
        assert got[first : last + 1] == [1] * (last + 1 - first), f"{request_id}: {got[first:]}"
        if request_id not in engine.finished:
            assert last == len(history) - 1, f"{request_id} stopped getting tokens"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_ten_thousand_queued_requests_cost_a_step_no_more_than_a_hundred(policy: str) -> None:
    def seconds_per_step(num_waiting: int) -> float:
        scheduler = create_scheduler(max_num_seqs=32, policy=policy, num_blocks=20_000)
        for i in range(32 + num_waiting):
            scheduler.add_request(make_request(str(i), [1, 2, 3], max_tokens=1000, ignore_eos=True))
        samples = []
        for _ in range(200):
            start = time.perf_counter()
            output = scheduler.schedule()
            scheduler.update_from_output(output, make_output(output))
            samples.append(time.perf_counter() - start)
        assert len(scheduler.running) == 32 and len(scheduler.waiting) == num_waiting
        return statistics.median(samples)

    # A walk through the queue would cost a hundred times more; a busy machine may cost one of three rounds.
    ratios = [seconds_per_step(10_000) / seconds_per_step(100) for _ in range(3)]
    assert min(ratios) < 2, ratios


# --- prompt log probabilities ---


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, "qwen2")
    return path


def with_prompt_logprobs(path: Path, **engine_args: Any) -> tuple[list[RequestOutput], int]:
    """Five prompts, four of which ask; return the outputs and the number of preemptions."""
    args = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "use_tqdm_on_load": False}
    llm = LLM(str(path), **(args | {"max_model_len": 96} | engine_args))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (50, 1, 16, 33, 50)]
    params = [
        SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, prompt_logprobs=k, logprobs=2)
        for k in (3, 0, 1, None, 5)
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return outputs, llm.llm_engine.engine_core.engine_core.scheduler._num_preemptions


@pytest.fixture(scope="module")
def unchunked(tiny: Path) -> list[RequestOutput]:
    outputs, _ = with_prompt_logprobs(tiny, max_num_seqs=1, enable_prefix_caching=False, async_scheduling=False)
    return outputs


def flat(entries: Any) -> tuple[list[Any], list[float]]:
    """Return ids and ranks, and the values, of a list of {id: Logprob}."""
    pairs = [(token_id, entry) for position in entries or [] for token_id, entry in (position or {}).items()]
    return [(token_id, entry.rank) for token_id, entry in pairs], [entry.logprob for _, entry in pairs]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("budget", [5, 16, 49, 512])
def test_prompt_logprobs_across_chunks_equal_those_in_one_piece(
    budget: int, tight: bool, async_scheduling: bool, tiny: Path, unchunked: list[RequestOutput]
) -> None:
    """A tight pool preempts requests, in the middle of a prompt too: what was gathered is not delivered twice."""
    outputs, num_preemptions = with_prompt_logprobs(
        tiny,
        max_num_seqs=5,
        max_num_batched_tokens=budget,
        block_size=8,
        num_gpu_blocks_override=13 if tight else 100,
        async_scheduling=async_scheduling,
    )
    assert (num_preemptions > 0) == tight
    for output, expected in zip(outputs, unchunked, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert (output.prompt_logprobs is None) == (expected.prompt_logprobs is None)
        for got, wanted in (
            (output.prompt_logprobs, expected.prompt_logprobs),
            (output.outputs[0].logprobs, expected.outputs[0].logprobs),
        ):
            assert flat(got)[0] == flat(wanted)[0]
            assert flat(got)[1] == pytest.approx(flat(wanted)[1], abs=1e-5)
    lengths = [len(output.prompt_logprobs or []) for output in outputs]
    assert lengths == [50, 1, 16, 0, 50]
