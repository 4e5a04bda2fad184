"""update_from_output and check_stop: which tokens count, who gets which log probabilities, when a request ends."""

from __future__ import annotations

from typing import Any

import pytest

from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.core.sched.utils import check_stop
from folovllm.outputs import FinishReason, LogprobsLists, ModelRunnerOutput
from folovllm.request import Request, RequestStatus
from tests.core_utils import (
    EOS,
    FakeEngine,
    create_requests,
    create_scheduler,
    make_request,
)


def by_hand(num_requests: int, **args: Any) -> tuple[Scheduler, list[Request], SchedulerOutput]:
    """Requests put into `running` by hand, without blocks, as tests of vLLM do."""
    scheduler = create_scheduler()
    requests = create_requests(num_requests, **args)
    for request in requests:
        request.num_computed_tokens = request.num_tokens
        request.status = RequestStatus.RUNNING
        scheduler.requests[request.request_id] = request
        scheduler.running.append(request)
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {request.request_id: 3 for request in requests}
    return scheduler, requests, output


def runner_output(requests: list[Request], sampled: list[list[int]], **args: Any) -> ModelRunnerOutput:
    ids = [request.request_id for request in requests]
    return ModelRunnerOutput(ids, {request_id: i for i, request_id in enumerate(ids)}, sampled, **args)


@pytest.mark.parametrize(
    ("args", "sampled", "kept", "status", "reason"),
    [
        ({}, [EOS], [EOS], RequestStatus.FINISHED_STOPPED, None),
        ({}, [10, EOS, 11], [10, EOS], RequestStatus.FINISHED_STOPPED, None),
        ({"stop_token_ids": [42, 43]}, [10, 42, 12], [10, 42], RequestStatus.FINISHED_STOPPED, 42),
        ({"max_tokens": 2}, [10, 11, 12], [10, 11], RequestStatus.FINISHED_LENGTH_CAPPED, None),
        ({"ignore_eos": True}, [EOS, 10, 11], [EOS, 10, 11], RequestStatus.RUNNING, None),
    ],
)
def test_tokens_after_the_stop_are_discarded(
    args: Any, sampled: list[int], kept: list[int], status: RequestStatus, reason: int | None
) -> None:
    scheduler, (request, other), output = by_hand(2, **args)
    given = list(sampled)
    result = scheduler.update_from_output(output, runner_output([request, other], [given, [13]]))
    assert list(request.output_token_ids) == kept
    assert (request.status, request.stop_reason) == (status, reason)
    assert given == sampled  # the runner's list is its own
    out = result[0].outputs[0]
    assert (out.new_token_ids, out.stop_reason) == (kept, reason)
    assert out.finished == request.is_finished() == ("0" in scheduler.finished_req_ids)
    assert [r.request_id for r in scheduler.running] == (["1"] if out.finished else ["0", "1"])


def test_unfinished_prefills_get_no_output() -> None:
    scheduler, requests, output = by_hand(2)
    result = scheduler.update_from_output(output, runner_output(requests, [[], [5]]))
    assert [out.request_id for out in result[0].outputs] == ["1"]
    assert scheduler.update_from_output(output, runner_output(requests, []))[0].outputs == []


def test_logprobs_go_to_those_who_asked() -> None:
    scheduler, requests, output = by_hand(3, logprobs=1)
    requests[1].sampling_params.logprobs = None
    logprobs = LogprobsLists([[1, 2], [3, 4], [5, 6]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], [1, 2, 3])
    # The runner's order need not be the scheduler's.
    order = [requests[2], requests[1], requests[0]]
    result = scheduler.update_from_output(output, runner_output(order, [[1], [3], [5]], logprobs=logprobs))
    outs = {out.request_id: out for out in result[0].outputs}
    assert outs["0"].new_logprobs == LogprobsLists([[5, 6]], [[0.5, 0.6]], [3])
    assert outs["1"].new_logprobs is None
    assert outs["2"].new_logprobs == LogprobsLists([[1, 2]], [[0.1, 0.2]], [1])
    assert outs["2"].new_token_ids == [1]


def test_prompt_logprobs_pass_through() -> None:
    scheduler, requests, output = by_hand(2)
    tensors = object()
    result = scheduler.update_from_output(
        output, runner_output(requests, [[5], []], prompt_logprobs_dict={"0": tensors, "1": tensors})
    )
    outs = result[0].outputs
    assert [out.new_prompt_logprobs_tensors for out in outs] == [tensors, tensors]
    assert [out.new_token_ids for out in outs] == [[5], []]


@pytest.mark.parametrize(
    ("args", "outputs", "stopped", "status", "reason"),
    [
        ({"min_tokens": 3, "max_tokens": 9}, [1, EOS], False, None, None),
        ({"min_tokens": 2, "max_tokens": 9}, [1, EOS], True, RequestStatus.FINISHED_STOPPED, None),
        ({"min_tokens": 3, "stop_token_ids": [5]}, [1, 5], False, None, None),
        ({"stop_token_ids": [5]}, [1, 5], True, RequestStatus.FINISHED_STOPPED, 5),
        ({"max_tokens": 2}, [1, EOS], True, RequestStatus.FINISHED_STOPPED, None),
        ({"max_tokens": 2}, [EOS, 1], True, RequestStatus.FINISHED_LENGTH_CAPPED, None),
        ({"max_tokens": 2, "ignore_eos": True}, [1, EOS], True, RequestStatus.FINISHED_LENGTH_CAPPED, None),
        ({"max_tokens": None}, [1] * 89, False, None, None),
        ({"max_tokens": None}, [1] * 90, True, RequestStatus.FINISHED_LENGTH_CAPPED, None),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [EOS], True, RequestStatus.FINISHED_STOPPED, EOS),
    ],
)
def test_check_stop_order(
    args: Any, outputs: list[int], stopped: bool, status: RequestStatus | None, reason: int | None
) -> None:
    request = make_request("r", range(10), **args)
    request.append_output_token_ids(outputs)
    assert check_stop(request, max_model_len=100) is stopped
    assert request.status == (RequestStatus.WAITING if status is None else status)
    assert request.stop_reason == reason


def test_min_tokens_does_not_exceed_max_model_len() -> None:
    engine = FakeEngine(create_scheduler(max_model_len=20, max_num_batched_tokens=64))
    engine.add(make_request("r", range(10), min_tokens=15, max_tokens=15))
    engine.run()
    assert len(engine.outputs["r"]) == 10
    assert engine.finished["r"].finish_reason == FinishReason.LENGTH
