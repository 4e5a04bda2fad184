"""OutputProcessor: from the core's tokens to RequestOutputs of every kind; log probabilities, aborts, queues."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import numpy as np
import pytest

from folovllm.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from folovllm.engine.output_processor import OutputProcessor, RequestOutputCollector
from folovllm.metrics.stats import IterationStats
from folovllm.outputs import CompletionOutput, LogprobsLists, LogprobsTensors, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.fakes import FakeTokenizer

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
TOKENIZER = FakeTokenizer()
TEXTS = ["hello world, and the rest", "日本語 é 😀!", "stop it\n\nnow", "x"]
PROMPTS = ["Say it:", "日", "a" * 50, "p"]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def make_request(request_id: str, prompt: str = "prompt", **params: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        f"{request_id}-int",
        ids_of(prompt),
        SamplingParams(**params),
        arrival_time=0.0,
        external_req_id=request_id,
    )


class FakeCore:
    """Gives each request's tokens one a step; ends it after the last, or at a stop token as the scheduler does."""

    def __init__(self, requests: list[EngineCoreRequest], tokens: list[list[int]]) -> None:
        self.requests, self.tokens = requests, tokens
        self.step = 0
        self.aborted: set[str] = set()

    def get_outputs(self) -> list[EngineCoreOutput]:
        outputs = []
        for request, tokens in zip(self.requests, self.tokens, strict=True):
            if self.step >= len(tokens) or request.request_id in self.aborted:
                continue
            params, token = request.sampling_params, tokens[self.step]
            output = EngineCoreOutput(request.request_id, [token])
            if params.logprobs is not None:
                output.new_logprobs = fake_logprobs([token], params.logprobs)
            if params.prompt_logprobs is not None and self.step == 0:
                lists = fake_logprobs(request.prompt_token_ids[1:], params.prompt_logprobs)
                output.new_prompt_logprobs_tensors = LogprobsTensors(*lists)
            if token in (params.stop_token_ids or ()) or token == params.eos_token_id:
                output.finish_reason = FinishReason.STOP
                output.stop_reason = None if token == params.eos_token_id else token
                self.aborted.add(request.request_id)
            elif self.step == len(tokens) - 1:
                output.finish_reason = FinishReason.LENGTH
            outputs.append(output)
        self.step += 1
        return outputs


def fake_logprobs(tokens: list[int], k: int, extra_columns: int = 2) -> LogprobsLists:
    """Rows wider than asked for, as when another request of the batch wants more."""
    id_rows = [[t, *range(10, 10 + k + extra_columns)] for t in tokens]
    ids = np.array(id_rows, dtype=np.int64).reshape(len(tokens), 1 + k + extra_columns)
    rows = [[-0.25 * (1 + t % 3), *(-1.0 - i for i in range(k + extra_columns))] for t in tokens]
    logprobs = np.array(rows, dtype=np.float32).reshape(ids.shape)
    return LogprobsLists(ids, logprobs, np.array([100 + t for t in tokens]))


def run(
    requests: list[EngineCoreRequest],
    tokens: list[list[int]],
    stream_interval: int = 1,
    processor: OutputProcessor | None = None,
) -> dict[str, list[RequestOutput]]:
    """Feed everything through an OutputProcessor; return the outputs by external id."""
    processor = processor or OutputProcessor(TOKENIZER, log_stats=False, stream_interval=stream_interval)
    for request in requests:
        processor.add_request(request, "the prompt")
    core = FakeCore(requests, tokens)
    received: dict[str, list[RequestOutput]] = {}
    while outputs := core.get_outputs():
        result = processor.process_outputs(outputs)
        core.aborted.update(result.reqs_to_abort)
        for output in result.request_outputs:
            received.setdefault(output.request_id, []).append(output)
    assert not processor.has_unfinished_requests() and processor.get_num_unfinished_requests() == 0
    assert not processor.external_req_ids
    return received


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
@pytest.mark.parametrize("stream_interval", [1, 3, 100])
def test_text_and_tokens_of_every_output_kind(kind: RequestOutputKind, stream_interval: int) -> None:
    requests = [make_request(f"r{i}", p, output_kind=kind) for i, p in enumerate(PROMPTS)]
    tokens = [ids_of(text) for text in TEXTS]
    received = run(requests, tokens, stream_interval)
    for i, (text, ids) in enumerate(zip(TEXTS, tokens, strict=True)):
        outputs = received[f"r{i}"]
        parts = [output.outputs[0] for output in outputs]
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert parts[-1].finish_reason == "length" and all(p.finish_reason is None for p in parts[:-1])
        assert outputs[0].prompt == "the prompt" and outputs[0].prompt_token_ids == ids_of(PROMPTS[i])
        if kind == DELTA:
            assert "".join(p.text for p in parts) == text
            assert [t for p in parts for t in p.token_ids] == ids
        else:
            assert parts[-1].text == text and parts[-1].token_ids == ids
            assert all(text.startswith(p.text) and ids[: len(p.token_ids)] == p.token_ids for p in parts)
        counts = [len(p.token_ids) for p in parts]
        if kind == FINAL_ONLY:
            assert len(parts) == 1
        elif kind == DELTA:
            # The first token at once, then stream_interval at a time, the end whenever it comes.
            assert counts[0] == 1 and all(c == stream_interval for c in counts[1:-1])
        else:
            assert counts[0] == 1
            assert all(b - a == stream_interval for a, b in itertools.pairwise(counts[:-1]))


def test_outputs_are_independent_of_each_other_and_of_the_core() -> None:
    """Users may change what they get: token lists are copies."""
    request = make_request("r", output_kind=CUMULATIVE, logprobs=0)
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(request, None)
    shared = [70]
    first = processor.process_outputs([_with_logprobs(request, shared)]).request_outputs[0]
    first.outputs[0].token_ids.append(99)  # type: ignore[attr-defined]
    first.outputs[0].logprobs.append({})  # type: ignore[union-attr]
    first.prompt_token_ids.append(99)  # type: ignore[union-attr]
    second = processor.process_outputs([_with_logprobs(request, [71])]).request_outputs[0]
    assert second.outputs[0].token_ids == [70, 71] and len(second.outputs[0].logprobs or ()) == 2
    assert shared == [70] and request.prompt_token_ids == ids_of("prompt")


def _with_logprobs(request: EngineCoreRequest, tokens: list[int]) -> EngineCoreOutput:
    return EngineCoreOutput(request.request_id, tokens, new_logprobs=fake_logprobs(tokens, 0))


# Stops.


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string(kind: RequestOutputKind, include: bool) -> None:
    """Text is cut, the core is told, nothing more comes; the token that completed it stays in token_ids."""
    params: dict[str, Any] = {"stop": ["wor", "zzz"], "include_stop_str_in_output": include, "logprobs": 1}
    request = make_request("r", output_kind=kind, **params)
    ids = ids_of("hello world, and more")
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(request, None)
    outputs, aborted = [], []
    for output in core_outputs(request, ids):
        result = processor.process_outputs([output])
        outputs += result.request_outputs
        aborted += result.reqs_to_abort
    kept = outputs if kind == DELTA else outputs[-1:]
    text = "".join(o.outputs[0].text for o in kept)
    tokens = [t for o in kept for t in o.outputs[0].token_ids]
    assert text == ("hello wor" if include else "hello ")
    assert TOKENIZER.decode(tokens) in ("hello wor", "hello world")
    last = outputs[-1]
    assert last.finished and last.outputs[0].finish_reason == "stop" and last.outputs[0].stop_reason == "wor"
    assert aborted == ["r-int"] and not processor.has_unfinished_requests()


def core_outputs(request: EngineCoreRequest, ids: list[int]) -> list[EngineCoreOutput]:
    """One output per token, with as many log probabilities as asked for."""
    return [
        EngineCoreOutput(
            request.request_id, [t], new_logprobs=fake_logprobs([t], request.sampling_params.logprobs or 0)
        )
        for t in ids
    ]


def test_stop_string_in_the_last_token_needs_no_abort() -> None:
    """The core ended the request by length in the same step: stop wins, and there is nothing to abort."""
    request = make_request("r", stop=["!"])
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(request, None)
    last = EngineCoreOutput("r-int", ids_of("!"), finish_reason=FinishReason.LENGTH)
    result = processor.process_outputs([last])
    assert result.reqs_to_abort == []
    assert result.request_outputs[0].outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("by_eos", [False, True])
@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE])
def test_stop_token(kind: RequestOutputKind, by_eos: bool, include: bool) -> None:
    """Its text is left out unless asked for; its id and log probabilities are kept."""
    stop_id = TOKENIZER.eos_token_id if by_eos else TOKENIZER.end_token_id
    request = make_request(
        "r",
        output_kind=kind,
        logprobs=2,
        skip_special_tokens=False,
        include_stop_str_in_output=include,
        stop_token_ids=None if by_eos else [stop_id],
    )
    request.sampling_params.update_from_generation_config({}, TOKENIZER.eos_token_id)
    ids = [*ids_of("héllo"), stop_id, stop_id]
    outputs = run([request], [ids])["r"]
    parts = [o.outputs[0] for o in outputs]
    last = parts[-1]
    name = TOKENIZER.special[stop_id] if include else ""
    if kind == DELTA:
        assert "".join(p.text for p in parts) == "héllo" + name
        assert [t for p in parts for t in p.token_ids] == ids[:-1]
        assert [len(p.logprobs or ()) for p in parts] == [1] * len(parts)
    else:
        assert last.text == "héllo" + name and last.token_ids == ids[:-1]
        assert len(last.logprobs or ()) == len(ids) - 1
    assert last.finish_reason == "stop" and last.stop_reason == (None if by_eos else stop_id)


def test_ignore_eos() -> None:
    request = make_request("r", ignore_eos=True, skip_special_tokens=False)
    request.sampling_params.update_from_generation_config({}, TOKENIZER.eos_token_id)
    output = run([request], [[*ids_of("a"), 1, 1]])["r"][-1].outputs[0]
    assert output.text == "a<eos><eos>" and output.finish_reason == "length"


def test_length_cut_within_a_character_flushes_it() -> None:
    outputs = run([make_request("r", output_kind=DELTA)], [ids_of("a😀")[:-1]])["r"]
    assert [o.outputs[0].text for o in outputs] == ["a", "", "", "\ufffd"]


def test_stop_string_in_what_only_the_end_reveals() -> None:
    request = make_request("r", stop=["\ufffd"])
    output = run([request], [ids_of("a😀")[:-1]])["r"][-1].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", "\ufffd")


def test_abort_from_the_core_says_why() -> None:
    request = make_request("r", output_kind=FINAL_ONLY)
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(request, None)
    processor.process_outputs([EngineCoreOutput("r-int", ids_of("a"))])
    end = EngineCoreOutput("r-int", [], finish_reason=FinishReason.ABORT, stop_reason="no blocks left")
    result = processor.process_outputs([end])
    output = result.request_outputs[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", "abort", "no blocks left")
    assert result.reqs_to_abort == []


# Log probabilities.


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
@pytest.mark.parametrize("num_logprobs", [None, 0, 1, 5])
@pytest.mark.parametrize("num_prompt_logprobs", [None, 0, 7])
def test_logprobs(kind: RequestOutputKind, num_logprobs: int | None, num_prompt_logprobs: int | None) -> None:
    requests = [
        make_request(f"r{i}", p, output_kind=kind, logprobs=num_logprobs, prompt_logprobs=num_prompt_logprobs)
        for i, p in enumerate(PROMPTS)
    ]
    tokens = [ids_of(text) for text in TEXTS]
    received = run(requests, tokens)
    for i, (request, ids) in enumerate(zip(requests, tokens, strict=True)):
        outputs = received[f"r{i}"]
        if num_logprobs is None:
            assert all(o.outputs[0].logprobs is None for o in outputs)
            assert all(o.outputs[0].cumulative_logprob is None for o in outputs)
        else:
            positions = [d for o in outputs for d in o.outputs[0].logprobs or ()]
            check_positions(positions, ids, num_logprobs)
            total = sum(float(d[t].logprob) for d, t in zip(positions, ids, strict=True))
            assert math.isclose(outputs[-1].outputs[0].cumulative_logprob or 0.0, total, rel_tol=1e-6)
        if num_prompt_logprobs is None:
            assert all(o.prompt_logprobs is None for o in outputs)
        else:
            first, *others = outputs[0].prompt_logprobs or ()
            assert first is None
            check_positions(others, request.prompt_token_ids[1:], num_prompt_logprobs)
            # In a stream they come once; [] afterwards, which a reader can append all the same.
            assert all(o.prompt_logprobs == [] for o in outputs[1:])


def check_positions(positions: list[Any], ids: list[int], k: int) -> None:
    """Compare with fake_logprobs: the token itself with its own rank, then ids 10, 11, ... with ranks 1, 2, ..."""
    assert len(positions) == len(ids)
    for position, token in zip(positions, ids, strict=True):
        assert next(iter(position)) == token and set(position) == {token, *range(10, 10 + k)}
        assert position[token].rank == 100 + token
        assert position[token].logprob == -0.25 * (1 + token % 3)
        for i, other in enumerate(range(10, 10 + k)):
            if other != token:
                assert (position[other].logprob, position[other].rank) == (-1.0 - i, i + 1)
        for other, logprob in position.items():
            alone = TOKENIZER.decode([other])
            if alone.endswith("\ufffd"):
                assert "\ufffd" not in logprob.decoded_token
            else:
                assert logprob.decoded_token == alone


def test_decoded_tokens_of_a_split_character() -> None:
    """The character belongs to the token that completes it; the sampled tokens' texts make up the text."""
    ids = ids_of("a😀b")
    request = make_request("r", output_kind=FINAL_ONLY, logprobs=0)
    logprobs = run([request], [ids])["r"][0].outputs[0].logprobs
    assert [d[t].decoded_token for d, t in zip(logprobs or (), ids, strict=True)] == ["a", "", "", "", "😀", "b"]


def test_decoded_token_that_ends_within_a_character_keeps_its_whole_ones() -> None:
    tokenizer = FakeTokenizer([b"ok\xf0", b"\x9f\x98", b"\x80", b"\x80!"])
    ids = [4 + 256 + i for i in (0, 1, 2, 3)]
    processor = OutputProcessor(tokenizer, log_stats=False)
    request = make_request("r", logprobs=0, output_kind=FINAL_ONLY)
    processor.add_request(request, None)
    outputs = core_outputs(request, ids)
    outputs[-1].finish_reason = FinishReason.LENGTH
    (output,) = processor.process_outputs(outputs).request_outputs
    logprobs = output.outputs[0].logprobs
    # The last token alone does not end in U+FFFD, so it stays as it is.
    assert [d[t].decoded_token for d, t in zip(logprobs or (), ids, strict=True)] == ["ok", "", "😀", "\ufffd!"]


@pytest.mark.parametrize("form", ["numpy", "lists", "torch"])
def test_logprobs_in_every_form(form: str) -> None:
    token_ids, logprobs, ranks, _ = fake_logprobs(ids_of("ab"), 1)
    if form == "lists":
        token_ids, logprobs, ranks = token_ids.tolist(), [list(row) for row in logprobs], ranks.tolist()
    elif form == "torch":
        torch = pytest.importorskip("torch")
        token_ids, logprobs, ranks = map(torch.from_numpy, (token_ids, logprobs, ranks))
    request = make_request("r", "xab", logprobs=1, prompt_logprobs=1)
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(request, None)
    output = EngineCoreOutput(
        "r-int",
        ids_of("ab"),
        new_logprobs=LogprobsLists(token_ids, logprobs, ranks),
        new_prompt_logprobs_tensors=LogprobsTensors(token_ids, logprobs, ranks),
    )
    result = processor.process_outputs([output]).request_outputs[0]
    assert result.outputs[0].logprobs == result.prompt_logprobs[1:]  # type: ignore[index]
    check_positions(result.outputs[0].logprobs or [], ids_of("ab"), 1)
    values = (result.outputs[0].logprobs or [])[0].values()
    assert all(type(v.logprob) is float and type(v.rank) is int for v in values)


def test_all_logprobs_and_a_sampled_token_among_the_best() -> None:
    """-1 keeps every column; the sampled token appears once, with the rank of column 0."""
    request = make_request("r", logprobs=-1)
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(request, None)
    rows = LogprobsLists([[7, 5, 7, 9]], [[-2.0, -1.0, -2.5, -3.0]], [4])
    result = processor.process_outputs([EngineCoreOutput("r-int", [7], new_logprobs=rows)])
    (position,) = result.request_outputs[0].outputs[0].logprobs or ()
    assert {t: (p.logprob, p.rank) for t, p in position.items()} == {7: (-2.0, 4), 5: (-1.0, 1), 9: (-3.0, 3)}


def test_logprobs_without_tokenizer() -> None:
    for tokenizer, detokenize in ((None, True), (TOKENIZER, False)):
        processor = OutputProcessor(tokenizer, log_stats=False)
        request = make_request("r", logprobs=1, detokenize=detokenize)
        processor.add_request(request, None)
        output = EngineCoreOutput("r-int", [70], new_logprobs=fake_logprobs([70], 1))
        sample = processor.process_outputs([output]).request_outputs[0].outputs[0]
        assert sample.text == "" and sample.token_ids == [70]
        assert [p.decoded_token for p in (sample.logprobs or [])[0].values()] == [None, None]


def test_logprobs_that_only_others_asked_for_are_dropped() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(make_request("r"), None)
    output = EngineCoreOutput("r-int", [70], new_logprobs=fake_logprobs([70], 1))
    output.new_prompt_logprobs_tensors = LogprobsTensors(*fake_logprobs([70], 1))
    result = processor.process_outputs([output]).request_outputs[0]
    assert result.outputs[0].logprobs is None and result.prompt_logprobs is None


def test_prompt_of_one_token_has_no_prompt_logprobs_but_the_leading_none() -> None:
    output = run([make_request("r", "p", prompt_logprobs=3)], [ids_of("a")])["r"][0]
    assert output.prompt_logprobs == [None]
    # The same where the core has nothing to send for it.
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(make_request("r", "p", prompt_logprobs=3), None)
    output = processor.process_outputs([EngineCoreOutput("r-int", [70])]).request_outputs[0]
    assert output.prompt_logprobs == [None]


# Statistics.


def test_iteration_stats_count_prompts_and_tokens() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=True)
    requests = [make_request(f"r{i}", p) for i, p in enumerate(PROMPTS[:3])]
    core = FakeCore(requests, [ids_of(t) for t in TEXTS[:3]])
    lengths = [len(r.prompt_token_ids) for r in requests]
    for request in requests[:2]:
        processor.add_request(request, None)
    for step, (prompts, tokens) in enumerate([(sum(lengths[:2]), 2), (0, 2), (lengths[2], 3), (0, 3)]):
        if step == 2:
            processor.add_request(requests[2], None)
        stats = IterationStats()
        processor.process_outputs(core.get_outputs(), 10.0 + step, stats)
        assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (prompts, tokens), step
        assert len(stats.time_to_first_tokens_iter) == (2, 0, 1, 0)[step]
        assert stats.inter_token_latencies_iter == [1.0] * (0, 2, 2, 3)[step]


def test_metrics_and_finished_requests() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=True)
    request = make_request("r", max_tokens=2)
    request.arrival_time = 5.0
    processor.add_request(request, None)
    stats = IterationStats(iteration_timestamp=7.0)
    first = EngineCoreOutput("r-int", [70], num_cached_tokens=3)
    output = processor.process_outputs([first], 100.0, stats).request_outputs[0]
    assert output.metrics is not None and output.metrics.first_token_latency == 2.0
    assert output.num_cached_tokens == stats.num_cached_tokens == 3
    stats = IterationStats(iteration_timestamp=9.0)
    end = EngineCoreOutput("r-int", [71], finish_reason=FinishReason.LENGTH)
    output = processor.process_outputs([end], 100.5, stats).request_outputs[0]
    (finished,) = stats.finished_requests
    assert (finished.request_id, finished.finish_reason) == ("r", FinishReason.LENGTH)
    assert (finished.e2e_latency, finished.decode_time, finished.num_cached_tokens) == (4.0, 0.5, 3)
    assert (finished.num_prompt_tokens, finished.num_generation_tokens) == (len(request.prompt_token_ids), 2)
    assert finished.max_tokens_param == 2 and stats.n_params_iter == [1]
    assert stats.max_num_generation_tokens_iter == [2]


def test_without_log_stats_there_are_no_metrics() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(make_request("r"), None)
    stats = IterationStats()
    output = processor.process_outputs([EngineCoreOutput("r-int", [70])], 1.0, stats).request_outputs[0]
    assert output.metrics is None and stats.num_generation_tokens == 0


# Requests come and go.


def test_an_id_can_be_used_again_once_its_request_has_finished() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    for _ in range(2):
        outputs = run([make_request("r")], [ids_of("ab")], processor=processor)
        assert outputs["r"][-1].outputs[0].text == "ab"


@pytest.mark.badinput
def test_an_id_in_use_is_refused() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(make_request("r"), None)
    with pytest.raises(ValueError, match=r"request_id='r-int' belongs to a request that is still running"):
        processor.add_request(make_request("r"), None)
    if processor.get_num_unfinished_requests() != 1:
        pytest.fail("the refused request was kept")


@pytest.mark.badinput
def test_stream_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stream_interval=0 must be at least 1"):
        OutputProcessor(TOKENIZER, log_stats=False, stream_interval=0)


def test_external_id_defaults_to_the_internal_one() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(EngineCoreRequest("x", [1], SamplingParams(), 0.0), None)
    assert processor.process_outputs([EngineCoreOutput("x", [70])]).request_outputs[0].request_id == "x"


def test_outputs_of_unknown_requests_are_ignored() -> None:
    result = OutputProcessor(TOKENIZER, log_stats=False).process_outputs([EngineCoreOutput("gone", [70])])
    assert result.request_outputs == [] and result.reqs_to_abort == []


def test_an_output_without_tokens_says_nothing() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    processor.add_request(make_request("r"), None)
    assert processor.process_outputs([EngineCoreOutput("r-int", [])]).request_outputs == []
    assert processor.has_unfinished_requests()


@pytest.mark.parametrize("internal", [True, False])
def test_abort(internal: bool) -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=True)
    queue = RequestOutputCollector(DELTA, "a-int")
    processor.add_request(make_request("a", output_kind=DELTA), None, queue=queue)
    processor.add_request(make_request("b"), None)
    ids = ["a-int", "b-int"] if internal else ["a", "b"]
    assert processor.process_outputs([EngineCoreOutput("a-int", [70])]).request_outputs == []
    assert processor.abort_requests([*ids, "unknown"], internal=internal) == ["a-int", "b-int"]
    assert not processor.has_unfinished_requests() and not processor.external_req_ids
    assert processor.abort_requests(ids, internal=internal) == []
    pending = queue.get_nowait()
    assert pending is not None and pending.finished
    assert (pending.outputs[0].token_ids, pending.outputs[0].finish_reason) == ([70], "abort")


def test_one_external_id_may_stand_for_several_requests() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    for internal_id in ("x", "y"):
        request = EngineCoreRequest(internal_id, [1], SamplingParams(), 0.0, external_req_id="same")
        processor.add_request(request, None)
    assert processor.abort_requests(["same"]) == ["x", "y"]


def test_errors_reach_every_reader() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    queue = RequestOutputCollector(DELTA, "a-int")
    processor.add_request(make_request("a"), None, queue=queue)
    processor.add_request(make_request("b"), None)
    processor.propagate_error(RuntimeError("worker died"))
    queue.put(_delta(0, "late", [1]))
    with pytest.raises(RuntimeError, match="worker died"):
        asyncio.run(queue.get())


# The collector.


def _delta(index: int, text: str, token_ids: list[int], finish_reason: str | None = None) -> RequestOutput:
    sample = CompletionOutput(index, text, token_ids, float(len(token_ids)), [{}], finish_reason)
    return RequestOutput("id", None, [1], None, [sample], finish_reason is not None)


def test_collector_merges_deltas() -> None:
    async def scenario() -> None:
        queue = RequestOutputCollector(DELTA, "id")
        queue.put(_delta(0, "a", [1]))
        assert queue.ready.is_set()
        output = await queue.get()
        assert queue.output is None and not queue.ready.is_set()
        assert output.outputs[0].text == "a" and not output.finished
        for part in (_delta(0, "b", [2]), _delta(0, "c", [3, 4]), _delta(1, "z", [9]), _delta(0, "d", [], "length")):
            queue.put(part)
        output = await queue.get()
        first, second = output.outputs
        assert (first.text, first.token_ids, first.finish_reason) == ("bcd", [2, 3, 4], "length")
        assert len(first.logprobs or ()) == 3 and first.cumulative_logprob == 0.0
        assert (second.index, second.text, output.finished) == (1, "z", True)
        assert queue.get_nowait() is None

    asyncio.run(scenario())


def test_collector_replaces_cumulative_outputs_by_index() -> None:
    queue = RequestOutputCollector(CUMULATIVE, "id")
    for part in (_delta(0, "a", [1]), _delta(1, "b", [2]), _delta(0, "ab", [1, 3]), _delta(2, "c", [4])):
        queue.put(part)
    output = queue.get_nowait()
    assert output is not None
    assert {o.index: (o.text, o.token_ids) for o in output.outputs} == {
        0: ("ab", [1, 3]),
        1: ("b", [2]),
        2: ("c", [4]),
    }


def test_collector_wakes_a_waiting_reader() -> None:
    async def scenario() -> str:
        queue = RequestOutputCollector(DELTA, "id")
        reader = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        assert not reader.done()
        queue.put(_delta(0, "a", [1]))
        return (await asyncio.wait_for(reader, timeout=5)).outputs[0].text

    assert asyncio.run(scenario()) == "a"
