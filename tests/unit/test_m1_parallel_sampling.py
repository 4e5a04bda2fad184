"""n > 1: children, their seeds, and one result for the client."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from folovllm.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from folovllm.engine.output_processor import OutputProcessor, RequestOutputCollector
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.metrics.stats import IterationStats
from folovllm.outputs import CompletionOutput, LogprobsTensors, RequestOutput
from folovllm.sampling_params import MAX_SEED, RequestOutputKind, SamplingParams
from tests.fakes import FakeTokenizer

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
TOKENIZER = FakeTokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def make_parent(**params: Any) -> ParentRequest:
    request = EngineCoreRequest(
        "parent",
        ids_of("prompt"),
        SamplingParams(**{"n": 3, "seed": 5} | params),
        arrival_time=1.0,
        external_req_id="client",
        priority=2,
        cache_salt="salt",
    )
    return ParentRequest(request)


def sample(index: int, finish_reason: str | None = None) -> CompletionOutput:
    return CompletionOutput(index, f"child {index}", [], finish_reason=finish_reason)


def test_children() -> None:
    parent = make_parent(prompt_logprobs=1, stop=["x"])
    children = parent.get_child_requests()
    assert [c.request_id for c in children] == ["0_parent", "1_parent", "2_parent"]
    assert parent.child_requests == {c.request_id for c in children} and parent.n == 3
    for i, child in enumerate(children):
        assert (child.external_req_id, child.priority, child.cache_salt) == ("client", 2, "salt")
        assert child.prompt_token_ids == ids_of("prompt") and child.arrival_time == 1.0
        assert (child.sampling_params.n, child.sampling_params.seed) == (1, 5 + i)
        # The prompt is the same for all: one child tells about it.
        assert child.sampling_params.prompt_logprobs == (1 if i == 0 else None)
        assert child.sampling_params.stop == ["x"]
    assert (parent.sampling_params.n, parent.sampling_params.seed) == (3, 5)
    assert len({id(c.sampling_params.stop) for c in children}) == 3


def test_seeds_wrap_around_and_may_be_missing() -> None:
    parent = make_parent(seed=MAX_SEED)
    assert [parent.get_child_info(i)[1].seed for i in range(3)] == [MAX_SEED, 0, 1]
    parent = make_parent(seed=None)
    assert [parent.get_child_info(i)[1].seed for i in range(3)] == [None] * 3


def test_external_id_defaults_to_the_internal_one() -> None:
    parent = ParentRequest(EngineCoreRequest("parent", [1], SamplingParams(n=2), 0.0))
    assert parent.external_req_id == "parent"


def test_streaming_outputs_pass_and_finished_children_once() -> None:
    parent = make_parent(n=2)
    parent.child_requests = {"a", "b"}
    first, second = sample(0), sample(1)
    for _ in range(2):
        assert parent.get_outputs("a", first) == ([first], False)
        assert parent.get_outputs("b", second) == ([second], False)
    second = sample(1, "stop")
    assert parent.get_outputs("b", second) == ([second], False)
    assert parent.get_outputs("a", first) == ([first], False)
    assert parent.get_outputs("b", second) == ([], False)
    first = sample(0, "stop")
    assert parent.get_outputs("a", first) == ([first], True)
    assert parent.get_outputs("a", first) == ([], True)
    assert parent.get_outputs("b", second) == ([], True)


def test_final_only_waits_for_all_and_orders_by_index() -> None:
    parent = make_parent(n=2, output_kind=FINAL_ONLY)
    parent.child_requests = {"a", "b"}
    assert parent.get_outputs("a", sample(0)) == ([], False)
    second, first = sample(1, "stop"), sample(0, "stop")
    assert parent.get_outputs("b", second) == ([], False)
    assert parent.get_outputs("a", first) == ([first, second], True)
    assert parent.get_outputs("b", second) == ([first, second], True)


TEXTS = ["abc", "x", "hello!"]


def run(
    kind: RequestOutputKind, queue: RequestOutputCollector | None = None, **params: Any
) -> tuple[list[RequestOutput], OutputProcessor, IterationStats]:
    """Run three children of different lengths through an OutputProcessor; the first tells about the prompt."""
    parent = make_parent(output_kind=kind, **params)
    processor = OutputProcessor(TOKENIZER, log_stats=True)
    children = parent.get_child_requests()
    for i, child in enumerate(children):
        processor.add_request(child, "prompt", parent, i, queue)
    assert processor.get_num_unfinished_requests() == 3
    tokens = [ids_of(text) for text in TEXTS]
    received, stats = [], IterationStats()
    for step in range(max(map(len, tokens))):
        outputs = []
        # The last child first, so that the first one's news are late.
        for i in (2, 1, 0):
            if step < len(tokens[i]):
                last = step == len(tokens[i]) - 1
                output = EngineCoreOutput(children[i].request_id, [tokens[i][step]], num_cached_tokens=4 + i)
                output.finish_reason = FinishReason.LENGTH if last else None
                if i == 0 and step == 0:
                    prompt = np.array(ids_of("prompt")[1:])
                    zeros = np.zeros_like(prompt)
                    output.new_prompt_logprobs_tensors = LogprobsTensors(prompt[:, None], zeros[:, None], zeros)
                outputs.append(output)
        received += processor.process_outputs(outputs, 1.0, stats).request_outputs
    assert not processor.has_unfinished_requests()
    assert not processor.parent_requests and not processor.external_req_ids
    return received, processor, stats


def test_final_only_result() -> None:
    received, _, stats = run(FINAL_ONLY, prompt_logprobs=0)
    (output,) = received
    assert output.request_id == "client" and output.finished and output.prompt == "prompt"
    assert [(o.index, o.text) for o in output.outputs] == list(enumerate(TEXTS))
    assert len(output.prompt_logprobs or ()) == len(ids_of("prompt"))
    # What the first child found in the prefix cache; the others mostly hit what it had just computed.
    assert output.num_cached_tokens == 4
    assert (stats.n_params_iter, len(stats.finished_requests)) == ([3], 3)
    assert stats.max_num_generation_tokens_iter == [max(len(ids_of(t)) for t in TEXTS)]


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE])
def test_streamed_result(kind: RequestOutputKind) -> None:
    received, _, _ = run(kind, prompt_logprobs=0)
    assert [o.finished for o in received] == [False] * (len(received) - 1) + [True]
    texts = {0: "", 1: "", 2: ""}
    for output in received:
        (part,) = output.outputs
        texts[part.index] = texts[part.index] + part.text if kind == DELTA else part.text
    assert list(texts.values()) == TEXTS
    with_prompt = [o for o in received if o.prompt_logprobs]
    assert len(with_prompt) == (1 if kind == DELTA else len(received) - 2)


def test_prompt_logprobs_are_none_where_nobody_asked() -> None:
    received, _, _ = run(DELTA)
    assert all(o.prompt_logprobs is None for o in received)


def test_queue_gets_everything() -> None:
    queue = RequestOutputCollector(DELTA, "parent")
    received, _, _ = run(DELTA, queue)
    assert received == []
    output = queue.get_nowait()
    assert output is not None and output.finished
    assert {o.index: o.text for o in output.outputs} == dict(enumerate(TEXTS))


def _add_children(processor: OutputProcessor, **params: Any) -> tuple[ParentRequest, list[EngineCoreRequest]]:
    parent = make_parent(**params)
    children = parent.get_child_requests()
    for i, child in enumerate(children):
        processor.add_request(child, None, parent, i)
    return parent, children


@pytest.mark.parametrize(("ids", "internal"), [(["client"], False), (["parent"], True)])
def test_abort_ends_all_children(ids: list[str], internal: bool) -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    _add_children(processor)
    assert processor.abort_requests(ids, internal) == ["0_parent", "1_parent", "2_parent"]
    assert not processor.has_unfinished_requests()
    assert not processor.parent_requests and not processor.external_req_ids


def test_abort_of_one_child_leaves_the_others() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    _, children = _add_children(processor, output_kind=FINAL_ONLY)
    assert processor.abort_requests(["1_parent"], internal=True) == ["1_parent"]
    outputs = [EngineCoreOutput(c.request_id, [70], finish_reason=FinishReason.LENGTH) for c in children]
    (output,) = processor.process_outputs(outputs).request_outputs
    assert [(o.index, o.finish_reason) for o in output.outputs] == [(0, "length"), (1, "abort"), (2, "length")]


def test_stop_string_ends_one_child_only() -> None:
    processor = OutputProcessor(TOKENIZER, log_stats=False)
    _, children = _add_children(processor, stop=["!"])
    tokens = [ids_of("!"), ids_of("a"), ids_of("b")]
    outputs = [EngineCoreOutput(c.request_id, t) for c, t in zip(children, tokens, strict=True)]
    assert processor.process_outputs(outputs).reqs_to_abort == ["0_parent"]
    assert processor.get_num_unfinished_requests() == 2
