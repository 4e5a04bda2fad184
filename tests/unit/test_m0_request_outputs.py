"""Request and its life, and the messages that outputs travel in."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from folovllm.engine import EngineCoreRequest
from folovllm.outputs import (
    CompletionOutput,
    EngineCoreOutput,
    EngineCoreOutputs,
    Logprob,
    LogprobsLists,
    LogprobsTensors,
    ModelRunnerOutput,
    RequestOutput,
)
from folovllm.request import ConstantList, FinishReason, Request, RequestStatus
from folovllm.sampling_params import SamplingParams


def make_request(request_id: str = "r", prompt: list[int] | None = None, **kwargs: Any) -> Request:
    return Request(request_id, [1, 2, 3] if prompt is None else prompt, SamplingParams(), **kwargs)


# Request.


def test_a_new_request() -> None:
    before = time.time()
    request = make_request(priority=4, cache_salt="s")
    assert before <= request.arrival_time <= time.time()
    assert (request.status, request.stop_reason, request.num_computed_tokens) == (RequestStatus.WAITING, None, 0)
    assert (request.priority, request.cache_salt, request.max_tokens) == (4, "s", 16)
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (3, 3, 0)
    assert request.block_hashes == [] and list(request.output_token_ids) == []
    assert make_request(arrival_time=0.0).arrival_time == 0.0
    assert not request.is_finished() and request.get_finished_reason() is None


def test_appending_tokens() -> None:
    prompt = [1, 2, 3]
    request = make_request(prompt=prompt)
    outputs, everything = request.output_token_ids, request.all_token_ids
    request.append_output_token_ids(7)
    request.append_output_token_ids([8, 9])
    assert list(outputs) == [7, 8, 9] and list(everything) == [1, 2, 3, 7, 8, 9]
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (6, 3, 3)
    assert prompt == [1, 2, 3], "the caller's list is its own"


def test_block_hashes_grow_in_place() -> None:
    """The hasher gives what is new; the list object stays, since the cache manager holds on to it."""
    size = 2

    def hasher(request: Request) -> list[Any]:
        new = range(len(request.block_hashes), request.num_tokens // size)
        return [tuple(request.all_token_ids[i * size : (i + 1) * size]) for i in new]

    request = make_request(prompt=[1, 2, 3], block_hasher=hasher)
    hashes = request.block_hashes
    assert hashes == [(1, 2)]
    request.append_output_token_ids(4)
    assert hashes == [(1, 2), (3, 4)]
    request.append_output_token_ids([5, 6, 7, 8, 9])
    assert hashes == [(1, 2), (3, 4), (5, 6), (7, 8)] and request.block_hashes is hashes


def test_the_hasher_is_asked_only_when_a_block_fills() -> None:
    asked = []

    def hasher(request: Request) -> list[Any]:
        asked.append(request.num_tokens)
        return [None] * (request.num_tokens // 4 - len(request.block_hashes))

    request = make_request(prompt=[1, 2, 3], block_hasher=hasher, hash_block_size=4)
    for token in range(9):
        request.append_output_token_ids(token)
    assert asked == [3, 4, 8, 12] and len(request.block_hashes) == 3
    request.append_output_token_ids([1, 2, 3, 4, 5])
    assert len(request.block_hashes) == 4


def test_requests_are_hashable_and_equal_only_to_themselves() -> None:
    one, twin = make_request(), make_request()
    assert one != twin and len({one, twin, one}) == 2


def test_priority_order() -> None:
    order = [
        make_request("b", priority=-1, arrival_time=9.0),
        make_request("z", priority=0, arrival_time=1.0),
        make_request("a", priority=0, arrival_time=2.0),
        make_request("b", priority=0, arrival_time=2.0),
        make_request("a", priority=1, arrival_time=0.0),
    ]
    assert sorted(order[i] for i in (3, 0, 4, 1, 2)) == order
    assert order[0] < order[1] and not order[1] < order[0]


def test_from_engine_core_request() -> None:
    params = SamplingParams(max_tokens=None)
    message = EngineCoreRequest("id", [4, 5], params, 3.0, external_req_id="x", priority=2, cache_salt="s")
    request = Request.from_engine_core_request(message, None)
    assert (request.request_id, request.prompt_token_ids, request.sampling_params) == ("id", [4, 5], params)
    assert (request.arrival_time, request.priority, request.cache_salt) == (3.0, 2, "s")
    assert request.max_tokens is None
    assert EngineCoreRequest("id", [4], params, 3.0).external_req_id is None


@pytest.mark.badinput
def test_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pooling_params is not supported.*leave it None"):
        make_request(pooling_params={})


def test_status() -> None:
    finished = {
        RequestStatus.FINISHED_STOPPED: FinishReason.STOP,
        RequestStatus.FINISHED_LENGTH_CAPPED: FinishReason.LENGTH,
        RequestStatus.FINISHED_ABORTED: FinishReason.ABORT,
        RequestStatus.FINISHED_IGNORED: FinishReason.LENGTH,
        RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
    }
    for status in RequestStatus:
        assert RequestStatus.is_finished(status) is (status in finished)
        assert RequestStatus.get_finished_reason(status) is finished.get(status)
        assert str(status) == f"{status}" == status.name
    request = make_request()
    request.status = RequestStatus.FINISHED_STOPPED
    assert request.is_finished() and request.get_finished_reason() is FinishReason.STOP


def test_finish_reasons_are_openais_words() -> None:
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]
    assert [f"{reason}" for reason in FinishReason] == ["stop", "length", "abort", "error"]


def test_constant_list_is_a_read_only_view() -> None:
    values = [1, 2, 3]
    view = ConstantList(values)
    assert view == [1, 2, 3] and view == ConstantList([1, 2, 3]) and view != [1]
    assert (view[0], view[-1], view[1:], len(view), list(view)) == (1, 3, [2, 3], 3, [1, 2, 3])
    assert 2 in view and view.index(3) == 2
    values.append(4)
    assert view[3] == 4
    copy = view.copy()
    copy.append(5)
    assert len(view) == 4
    assert not hasattr(view, "append")
    with pytest.raises(TypeError):
        view[0] = 9  # type: ignore[index]
    with pytest.raises(TypeError):
        hash(view)


def test_constant_list_of_the_end_of_a_list() -> None:
    values = [1, 2, 3]
    view = ConstantList(values, start=3)
    assert view == [] and not view and list(view) == []
    with pytest.raises(IndexError):
        view[0]
    values += [4, 5, 6]
    assert view == [4, 5, 6] and view == ConstantList([4, 5, 6]) and view != values
    assert (view[0], view[-1], view[-2:], view[:-1], len(view)) == (4, 6, [5, 6], [4, 5], 3)
    assert list(view) == view.copy() == [4, 5, 6] and 3 not in view and view.index(5) == 1
    assert repr(view) == "ConstantList([4, 5, 6])"
    with pytest.raises(IndexError):
        view[-4]


# Messages.


def test_logprobs_lists_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    ids, logprobs = torch.arange(6).reshape(3, 2), -torch.arange(6.0).reshape(3, 2)
    lists = LogprobsTensors(ids, logprobs, torch.tensor([5, 6, 7])).tolists()
    assert isinstance(lists, LogprobsLists) and len(lists) == 4 and lists.extra is None
    assert all(isinstance(part, np.ndarray) for part in lists[:3])
    rows = lists.slice_request(1, 2)
    assert rows.logprob_token_ids.tolist() == [[2, 3], [4, 5]] and rows.sampled_token_ranks.tolist() == [6, 7]
    assert LogprobsLists([[1], [2]], [[0.0], [0.5]], [1, 2]).slice_request(0, 1) == ([[1]], [[0.0]], [1], None)


def test_engine_core_output() -> None:
    output = EngineCoreOutput("id", [3], None, None, FinishReason.STOP, "stop string")
    assert output.finished and output.stop_reason == "stop string"
    output = EngineCoreOutput("id", [3])
    assert not output.finished and output.new_logprobs is None and output.new_prompt_logprobs_tensors is None
    output.finish_reason = FinishReason.ABORT
    assert output.finished
    assert EngineCoreOutputs().outputs == [] and EngineCoreOutputs().outputs is not EngineCoreOutputs().outputs


def test_model_runner_output() -> None:
    output = ModelRunnerOutput(["a"], {"a": 0}, [[5]])
    assert output.logprobs is None and output.prompt_logprobs_dict == {}
    assert ModelRunnerOutput([], {}, []).prompt_logprobs_dict is not output.prompt_logprobs_dict


# RequestOutput.


def part(index: int, text: str, ids: list[int], finish: str | None = None, **kwargs: Any) -> RequestOutput:
    sample = CompletionOutput(index, text, ids, -1.0 * len(ids), [{i: Logprob(-1.0)} for i in ids], finish)
    return RequestOutput("id", "p", [1], kwargs.pop("prompt_logprobs", None), [sample], finish is not None, **kwargs)


def test_adding_deltas_concatenates_per_index() -> None:
    merged = part(0, "a", [1])
    for piece in (part(1, "x", [9]), part(0, "b", [2, 3]), part(0, "", [4], "stop")):
        merged.add(piece, aggregate=True)
    first, second = merged.outputs
    assert (first.text, list(first.token_ids), first.finish_reason) == ("ab", [1, 2, 3, 4], "stop")
    assert [set(d) for d in first.logprobs or ()] == [{1}, {2}, {3}, {4}]
    assert first.cumulative_logprob == -1.0 and first.finished() and merged.finished
    assert (second.index, second.text, second.finished()) == (1, "x", False)


def test_adding_does_not_change_the_parts() -> None:
    first, second = part(0, "a", [1]), part(0, "b", [2])
    sample, ids = second.outputs[0], first.outputs[0].token_ids
    first.add(second, aggregate=True)
    assert ids == [1] and (sample.text, sample.token_ids, len(sample.logprobs or ())) == ("b", [2], 1)


def test_adding_cumulative_outputs_replaces_per_index() -> None:
    merged = part(0, "a", [1])
    for piece in (part(1, "x", [9]), part(0, "ab", [1, 2])):
        merged.add(piece, aggregate=False)
    assert [(o.index, o.text, o.token_ids) for o in merged.outputs] == [(0, "ab", [1, 2]), (1, "x", [9])]
    assert not merged.finished


def test_adding_without_logprobs() -> None:
    merged = RequestOutput("id", None, [1], None, [CompletionOutput(0, "a", [1])], False)
    merged.add(RequestOutput("id", None, [1], None, [CompletionOutput(0, "b", [2])], True), aggregate=True)
    assert merged.outputs[0].logprobs is None and merged.outputs[0].cumulative_logprob is None


@pytest.mark.parametrize("aggregate", [True, False])
def test_adding_keeps_prompt_logprobs_whichever_part_brought_them(aggregate: bool) -> None:
    """With n > 1 another sample's output may come before the one that knows the prompt."""
    late = part(0, "a", [1], prompt_logprobs=[None], num_cached_tokens=4)
    merged = part(1, "x", [9], prompt_logprobs=None)
    merged.add(late, aggregate)
    assert merged.prompt_logprobs == [None]
    merged.add(part(0, "b", [2], prompt_logprobs=[]), aggregate)
    assert merged.prompt_logprobs == [None]


def test_no_torch() -> None:
    """These modules reach every process, also those without a model."""
    modules = "folovllm.request, folovllm.sampling_params, folovllm.outputs, folovllm.engine, folovllm.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
