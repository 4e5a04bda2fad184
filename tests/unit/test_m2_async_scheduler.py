"""AsyncScheduler: placeholders, tokens that come too late, the same tokens as without look-ahead."""

from __future__ import annotations

import pytest

from folovllm.core.sched.scheduler import Scheduler
from folovllm.outputs import FinishReason
from folovllm.request import Request
from tests.core_utils import (
    EOS,
    FakeEngine,
    create_requests,
    create_scheduler,
    expected_tokens,
    make_output,
    make_request,
)


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add_request(request)


def test_async_schedules_with_a_placeholder_and_tells_the_worker() -> None:
    scheduler = create_scheduler(use_async=True)
    request = make_request("r", range(10), max_tokens=4)
    add(scheduler, request)
    first = scheduler.schedule()
    second = scheduler.schedule()  # the first token is not known yet
    assert second.num_scheduled_tokens == {"r": 1}
    cached = second.scheduled_cached_reqs
    assert (cached.num_computed_tokens, cached.num_output_tokens) == ([10], [1])
    scheduler.update_from_output(first, make_output(first))
    third = scheduler.schedule()
    assert third.scheduled_cached_reqs.num_output_tokens == [2]
    fourth = scheduler.schedule()
    assert fourth.num_scheduled_tokens == {"r": 1}
    # Four tokens are on their way or here: the request will surely end with them.
    assert scheduler.schedule().num_scheduled_tokens == {}
    for output in (second, third, fourth):
        result = scheduler.update_from_output(output, make_output(output))
    assert result[0].outputs[0].finished and not scheduler.requests
    assert request.num_output_placeholders == 0 and request.num_output_tokens == 4


def test_async_drops_the_token_after_a_stop_even_for_a_new_request_of_that_id() -> None:
    scheduler = create_scheduler(use_async=True)
    add(scheduler, make_request("r", range(10)))
    first, second = scheduler.schedule(), scheduler.schedule()
    result = scheduler.update_from_output(first, make_output(first, EOS))
    assert result[0].outputs[0].finish_reason == FinishReason.STOP
    newcomer = make_request("r", range(5))
    add(scheduler, newcomer)
    third = scheduler.schedule()
    assert third.finished_req_ids == {"r"} and third.scheduled_new_reqs[0].req_id == "r"
    assert scheduler.update_from_output(second, make_output(second, 8))[0].outputs == []
    assert newcomer.num_output_tokens == 0
    scheduler.update_from_output(third, make_output(third, 9))
    assert list(newcomer.output_token_ids) == [9]
    assert scheduler._num_stale_tokens == {}


def test_async_does_not_readmit_before_the_last_token_has_arrived() -> None:
    scheduler = create_scheduler(use_async=True)
    request = make_request("r", range(10))
    add(scheduler, request)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.update_from_output(first, make_output(first, 3))
    third = scheduler.schedule()
    assert third.num_scheduled_tokens == {} and third.preempted_req_ids == {"r"}
    scheduler.update_from_output(second, make_output(second, 4))
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"r": 12}
    assert output.scheduled_cached_reqs.all_token_ids == {"r": [*range(10), 3, 4]}


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("stop_token_ids", [[], list(range(0, 90, 4))])
def test_async_tokens_equal_sync_tokens_at_any_depth(depth: int, stop_token_ids: list[int]) -> None:
    engine = FakeEngine(
        create_scheduler(
            num_blocks=14,
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=12,
            use_async=True,
            enable_prefix_caching=True,
        ),
        depth,
    )
    requests = create_requests(7, 9, block_size=4, max_tokens=15, stop_token_ids=stop_token_ids, ignore_eos=True)
    engine.add(*requests)
    engine.run()
    for request in requests:
        assert engine.outputs[request.request_id] == expected_tokens(request, 8192)
