"""Scheduler: order, budget, chunks, preemption, resumption, stops, aborts, requests that never fit, fairness."""

from __future__ import annotations

from typing import Any

import pytest

from folovllm.core.kv_cache_manager import KVCacheBlocks
from folovllm.core.sched.output import CachedRequestData, SchedulerOutput
from folovllm.core.sched.request_queue import (
    FCFSRequestQueue,
)
from folovllm.core.sched.scheduler import Scheduler
from folovllm.outputs import EMPTY_MODEL_RUNNER_OUTPUT, FinishReason
from folovllm.request import Request, RequestStatus
from tests.core_utils import (
    EOS,
    FakeEngine,
    create_requests,
    create_scheduler,
    expected_tokens,
    make_output,
    make_request,
)

ABORTED = RequestStatus.FINISHED_ABORTED


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add_request(request)


def step(scheduler: Scheduler, token_id: int = 7, only: set[str] | None = None) -> SchedulerOutput:
    """One whole step; requests in `only` (all, if None) get a token."""
    output = scheduler.schedule()
    scheduler.update_from_output(output, make_output(output, token_id, only))
    scheduler.kv_cache_manager.check_integrity()
    return output


def queue_ids(scheduler: Scheduler) -> tuple[list[str], list[str]]:
    """(running, waiting) request ids in order."""
    return [r.request_id for r in scheduler.running], [r.request_id for r in scheduler.waiting]


# --- requests come and go ---


def test_add_count_and_finish() -> None:
    scheduler = create_scheduler()
    requests = create_requests(10)
    add(scheduler, *requests)
    assert scheduler.get_num_unfinished_requests() == 10 and scheduler.get_request_counts() == (0, 10)
    assert list(scheduler.waiting) == requests and scheduler.waiting[3] is requests[3]
    for i, request in enumerate(requests):
        assert scheduler.finish_requests(request.request_id, ABORTED) == [request.request_id]
        assert request.status == ABORTED and request.request_id not in scheduler.requests
        assert scheduler.get_num_unfinished_requests() == 9 - i
    assert not scheduler.has_unfinished_requests() and scheduler.has_finished_requests()
    assert scheduler.schedule().finished_req_ids == {str(i) for i in range(10)}
    assert not scheduler.has_requests()
    scheduler.shutdown()


@pytest.mark.badinput
def test_an_id_in_use_is_refused() -> None:
    scheduler = create_scheduler()
    scheduler.add_request(make_request("x", [1]))
    with pytest.raises(ValueError, match="request_id='x' is in use"):
        scheduler.add_request(make_request("x", [2]))


def test_finish_several_all_and_unknown_ones() -> None:
    scheduler = create_scheduler(max_num_seqs=3)
    add(scheduler, *create_requests(6))
    step(scheduler)
    assert queue_ids(scheduler) == (["0", "1", "2"], ["3", "4", "5"])
    assert scheduler.finish_requests(["1", "4", "nobody", "1"], ABORTED) == ["1", "4"]
    assert queue_ids(scheduler) == (["0", "2"], ["3", "5"])
    scheduler.kv_cache_manager.check_integrity()
    assert set(scheduler.finish_requests(None, ABORTED)) == {"0", "2", "3", "5"}
    assert scheduler.get_request_counts() == (0, 0)
    assert scheduler.kv_cache_manager.usage == 0.0
    assert scheduler.finish_requests("0", ABORTED) == []


def test_abort_while_the_step_runs() -> None:
    scheduler = create_scheduler()
    add(scheduler, *create_requests(2))
    output = scheduler.schedule()
    scheduler.finish_requests("0", ABORTED)
    result = scheduler.update_from_output(output, make_output(output))
    assert [out.request_id for out in result[0].outputs] == ["1"]
    assert scheduler.schedule().finished_req_ids == {"0"}


def test_finished_ids_are_reported_once() -> None:
    scheduler = create_scheduler()
    add(scheduler, *create_requests(2, max_tokens=1))
    first = step(scheduler)
    assert first.finished_req_ids == set()
    assert scheduler.finished_req_ids == {"0", "1"}
    second = scheduler.schedule()
    assert second.finished_req_ids == {"0", "1"}
    assert scheduler.finished_req_ids == set()
    assert second.total_num_scheduled_tokens == 0
    assert scheduler.update_from_output(second, EMPTY_MODEL_RUNNER_OUTPUT)[0].outputs == []
    assert scheduler.schedule().finished_req_ids == set()


# --- what a step holds ---


def test_first_step_describes_new_requests_in_full() -> None:
    scheduler = create_scheduler()
    requests = create_requests(3, 20)
    add(scheduler, *requests)
    output = scheduler.schedule()
    assert [new.req_id for new in output.scheduled_new_reqs] == ["0", "1", "2"]
    assert [new.block_ids for new in output.scheduled_new_reqs] == [([1, 2],), ([3, 4],), ([5, 6],)]
    new = output.scheduled_new_reqs[1]
    assert new.prompt_token_ids == requests[1].prompt_token_ids and new.num_computed_tokens == 0
    assert new.sampling_params is requests[1].sampling_params
    assert output.num_scheduled_tokens == {"0": 20, "1": 20, "2": 20}
    assert output.total_num_scheduled_tokens == 60
    assert output.scheduled_cached_reqs == CachedRequestData.make_empty()
    assert output.num_common_prefix_blocks == [0]
    assert all(r.num_computed_tokens == 20 and r.status == RequestStatus.RUNNING for r in requests)


def test_later_steps_carry_only_deltas() -> None:
    scheduler = create_scheduler()
    add(scheduler, *create_requests(2, 15))
    step(scheduler)
    second, third = step(scheduler), step(scheduler)
    assert second.scheduled_new_reqs == []
    cached = second.scheduled_cached_reqs
    assert cached.req_ids == ["0", "1"] and cached.num_reqs == 2
    assert cached.new_block_ids == [None, None]
    assert (cached.num_computed_tokens, cached.num_output_tokens) == ([15, 15], [1, 1])
    assert cached.resumed_req_ids == set() and cached.all_token_ids == {}
    assert third.scheduled_cached_reqs.new_block_ids == [([3],), ([4],)]


def test_messages_can_be_built_as_vllm_builds_them() -> None:
    output = SchedulerOutput(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=CachedRequestData.make_empty(),
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        num_common_prefix_blocks=[0],
        finished_req_ids=set(),
        free_encoder_mm_hashes=[],
    )
    assert output == SchedulerOutput.make_empty()


def test_budget_chunks_the_prompt_and_samples_only_at_its_end() -> None:
    engine = FakeEngine(create_scheduler(max_num_batched_tokens=16, max_num_seqs=4))
    requests = create_requests(2, 20, ignore_eos=True)
    engine.add(*requests)
    assert engine.step().num_scheduled_tokens == {"0": 16}
    assert engine.outputs["0"] == []
    assert engine.step().num_scheduled_tokens == {"0": 4, "1": 12}
    assert [len(engine.outputs[i]) for i in "01"] == [1, 0]
    assert engine.step().num_scheduled_tokens == {"0": 1, "1": 8}
    engine.run()
    for request in requests:
        assert engine.outputs[request.request_id] == expected_tokens(request, 8192)


def test_long_prefill_token_threshold() -> None:
    scheduler = create_scheduler(max_num_batched_tokens=1024, long_prefill_token_threshold=400)
    add(scheduler, *create_requests(3, 800))
    assert step(scheduler, only=set()).num_scheduled_tokens == {"0": 400, "1": 400, "2": 224}
    assert step(scheduler, only={"0", "1"}).num_scheduled_tokens == {"0": 400, "1": 400, "2": 224}
    assert step(scheduler).num_scheduled_tokens == {"0": 1, "1": 1, "2": 352}


@pytest.mark.parametrize("enable_chunked_prefill", [True, False])
def test_what_does_not_fit_the_budget_is_not_skipped(enable_chunked_prefill: bool) -> None:
    scheduler = create_scheduler(
        max_num_batched_tokens=1024, max_model_len=1024, enable_chunked_prefill=enable_chunked_prefill
    )
    add(scheduler, *create_requests(2, 800), *create_requests(2, 10, start=2))
    output = step(scheduler)
    if enable_chunked_prefill:
        assert output.num_scheduled_tokens == {"0": 800, "1": 224}
    else:
        assert output.num_scheduled_tokens == {"0": 800}
        assert step(scheduler).num_scheduled_tokens == {"0": 1, "1": 800, "2": 10, "3": 10}


def test_what_does_not_fit_the_pool_is_not_skipped() -> None:
    scheduler = create_scheduler(num_blocks=6)
    add(scheduler, *create_requests(1, 30), *create_requests(1, 64, start=1), *create_requests(1, 5, start=2))
    assert step(scheduler).num_scheduled_tokens == {"0": 30}
    assert queue_ids(scheduler) == (["0"], ["1", "2"])


def test_a_prompt_is_admitted_only_if_all_of_it_has_room() -> None:
    scheduler = create_scheduler(num_blocks=6, max_num_batched_tokens=32)
    add(scheduler, *create_requests(1, 30), *create_requests(1, 64, start=1))
    # The first chunk of "1" would fit; the rest would only preempt somebody.
    assert step(scheduler).num_scheduled_tokens == {"0": 30}


def test_max_num_seqs() -> None:
    scheduler = create_scheduler(max_num_seqs=2)
    add(scheduler, *create_requests(3, max_tokens=2))
    assert list(step(scheduler).num_scheduled_tokens) == ["0", "1"]
    assert list(step(scheduler).num_scheduled_tokens) == ["0", "1"]
    assert list(step(scheduler).num_scheduled_tokens) == ["2"]


def test_schedule_again_before_the_output_skips_who_waits_for_it() -> None:
    scheduler = create_scheduler(max_num_batched_tokens=1024)
    a, b = create_requests(2, 512)
    add(scheduler, a)
    first = scheduler.schedule()
    add(scheduler, b)
    second = scheduler.schedule()
    assert (first.num_scheduled_tokens, second.num_scheduled_tokens) == ({"0": 512}, {"1": 512})
    assert queue_ids(scheduler) == (["0", "1"], [])
    assert scheduler.schedule().num_scheduled_tokens == {}
    scheduler.update_from_output(first, make_output(first))
    assert scheduler.schedule().num_scheduled_tokens == {"0": 1}
    scheduler.update_from_output(second, make_output(second))
    assert scheduler.schedule().num_scheduled_tokens == {"1": 1}


def test_ten_thousand_waiting_requests_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = create_scheduler(max_num_seqs=4)
    add(scheduler, *create_requests(10_004, 1))
    step(scheduler)

    def refuse(self: FCFSRequestQueue) -> Any:
        raise AssertionError("a step walked through the waiting queue")

    monkeypatch.setattr(FCFSRequestQueue, "__iter__", refuse)
    assert len(step(scheduler).num_scheduled_tokens) == 4
    scheduler.finish_requests("7000", ABORTED)
    assert len(scheduler.waiting) == 9_999


# --- preemption ---


def preempted_pair(**args: Any) -> tuple[Scheduler, list[Request]]:
    """Two requests of 32 tokens that fill a pool of 4 blocks, one step before it is too small."""
    scheduler = create_scheduler(num_blocks=5, **args)
    requests = create_requests(2, 32)
    add(scheduler, *requests)
    step(scheduler)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    return scheduler, requests


def test_fcfs_preempts_the_last_and_admits_nobody_in_that_step() -> None:
    scheduler, (first, last) = preempted_pair()
    add(scheduler, make_request("late", [1]))
    output = step(scheduler)
    assert output.num_scheduled_tokens == {"0": 1}
    assert output.preempted_req_ids == {"1"}
    assert queue_ids(scheduler) == (["0"], ["1", "late"])
    assert last.status == RequestStatus.PREEMPTED
    assert (last.num_computed_tokens, last.num_preemptions) == (0, 1)
    assert "1" not in scheduler.kv_cache_manager.req_to_blocks
    assert step(scheduler).preempted_req_ids == set()
    assert first.num_output_tokens == 3


def test_a_request_may_be_its_own_victim() -> None:
    scheduler = create_scheduler(num_blocks=5)
    add(scheduler, *create_requests(1, 32), *create_requests(1, 31, start=1))
    step(scheduler)
    # "0" takes no block from "1", which is last: "1" goes when "0" needs one; then "0" alone goes on.
    assert step(scheduler).num_scheduled_tokens == {"0": 1}
    scheduler = create_scheduler(num_blocks=5)
    add(scheduler, *create_requests(1, 30), *create_requests(1, 32, start=1))
    step(scheduler)
    output = step(scheduler)  # "1" needs a third block and is itself the last
    assert output.num_scheduled_tokens == {"0": 1}
    assert queue_ids(scheduler) == (["0"], ["1"])


def test_resumed_request_is_sent_whole_and_recomputes_everything() -> None:
    scheduler, (_, last) = preempted_pair()
    step(scheduler)
    scheduler.finish_requests("0", ABORTED)
    output = scheduler.schedule()
    assert output.scheduled_new_reqs == []
    cached = output.scheduled_cached_reqs
    assert cached.req_ids == ["1"] and cached.resumed_req_ids == {"1"}
    assert output.num_scheduled_tokens == {"1": 33}  # prompt and the token it had
    assert len(cached.new_block_ids[0][0]) == 3
    assert (cached.num_computed_tokens, cached.num_output_tokens) == ([0], [1])
    assert cached.all_token_ids == {"1": [*last.prompt_token_ids, 7]}
    assert last.status == RequestStatus.RUNNING


def test_resumed_request_hits_the_prefix_cache() -> None:
    scheduler, (_, last) = preempted_pair(enable_prefix_caching=True)
    step(scheduler)
    scheduler.finish_requests("0", ABORTED)
    output = scheduler.schedule()
    # "0" took one of its two blocks: the tail.
    assert output.num_scheduled_tokens == {"1": 17}
    assert output.scheduled_cached_reqs.num_computed_tokens == [16]
    assert last.num_cached_tokens == 0  # counts the first admission only


def test_preempted_while_the_step_ran_still_gets_its_token() -> None:
    scheduler = create_scheduler(num_blocks=11, max_num_batched_tokens=100)
    a, b = create_requests(2, 80)
    add(scheduler, a)
    first = scheduler.schedule()
    add(scheduler, b)
    second = scheduler.schedule()
    scheduler.update_from_output(first, make_output(first))
    scheduler.schedule()
    assert b.status == RequestStatus.PREEMPTED
    scheduler.update_from_output(second, make_output(second, 42))
    assert list(b.output_token_ids) == [42] and b.status == RequestStatus.PREEMPTED


def test_preempted_while_the_step_ran_may_stop() -> None:
    scheduler = create_scheduler(num_blocks=11, max_num_batched_tokens=100)
    a, b = create_requests(2, 80)
    add(scheduler, a)
    first = scheduler.schedule()
    add(scheduler, b)
    second = scheduler.schedule()
    scheduler.update_from_output(first, make_output(first))
    scheduler.schedule()
    result = scheduler.update_from_output(second, make_output(second, EOS))
    assert result[0].outputs[0].finish_reason == FinishReason.STOP
    assert queue_ids(scheduler) == (["0"], []) and "1" not in scheduler.requests
    assert scheduler.finished_req_ids == {"1"}
    scheduler.kv_cache_manager.check_integrity()


def test_abort_of_a_preempted_request() -> None:
    scheduler, _ = preempted_pair()
    step(scheduler)
    scheduler.finish_requests("1", ABORTED)
    assert queue_ids(scheduler) == (["0"], [])
    assert step(scheduler).finished_req_ids == {"1"}
    scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.finish_requests("0", ABORTED)
    output = step(scheduler)
    assert (output.finished_req_ids, output.preempted_req_ids) == ({"0"}, set())


def test_preemption_outside_a_step_is_reported_with_the_next_one() -> None:
    scheduler, _ = preempted_pair()
    scheduler.reset_prefix_cache(reset_running_requests=True)
    output = step(scheduler)
    assert output.preempted_req_ids == {"0", "1"}
    assert output.scheduled_cached_reqs.resumed_req_ids == {"0"}


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("num_tokens", [11, 12, 13])
def test_preemption_never_changes_tokens(
    policy: str, enable_prefix_caching: bool, use_async: bool, num_tokens: int
) -> None:
    scheduler = create_scheduler(
        num_blocks=13,
        block_size=4,
        max_num_batched_tokens=16,
        policy=policy,
        enable_prefix_caching=enable_prefix_caching,
        use_async=use_async,
    )
    engine = FakeEngine(scheduler, depth=int(use_async))
    requests = create_requests(
        6, num_tokens, block_size=4, priorities=[0, 3, 1, 2, 1, 0], max_tokens=20, ignore_eos=True
    )
    engine.add(*requests)
    engine.run()
    assert sum(request.num_preemptions for request in requests) > 0
    for request in requests:
        assert engine.outputs[request.request_id] == expected_tokens(request, 8192)


# --- priority ---


def test_priority_order_of_admission() -> None:
    scheduler = create_scheduler(policy="priority")
    add(scheduler, *create_requests(4, priorities=[2, 1, 1, 0], arrival_times=[1, 3, 2, 4]))
    assert [new.req_id for new in scheduler.schedule().scheduled_new_reqs] == ["3", "2", "1", "0"]


def test_priority_preempts_the_least_urgent_and_latest() -> None:
    scheduler = create_scheduler(policy="priority", num_blocks=7)
    # All fill their blocks; the pool is full, and whoever is first needs a block.
    a, b, c = create_requests(3, 32, priorities=[0, 5, 5], arrival_times=[3, 2, 1])
    add(scheduler, a)
    step(scheduler, only=set())
    add(scheduler, b, c)
    scheduler.schedule()
    assert queue_ids(scheduler)[0] == ["0", "2", "1"]
    a.append_output_token_ids(7)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"0": 1}
    assert queue_ids(scheduler) == (["0", "2"], ["1"])


def test_withdrawing_a_scheduled_request_returns_its_budget() -> None:
    scheduler = create_scheduler(policy="priority", num_blocks=6, max_num_batched_tokens=20)
    low, high = make_request("low", [1] * 30, priority=9), make_request("high", [2] * 32, priority=1)
    add(scheduler, low)
    assert step(scheduler, only=set()).num_scheduled_tokens == {"low": 20}
    add(scheduler, high)
    assert step(scheduler, only={"low"}).num_scheduled_tokens == {"low": 10, "high": 10}
    assert step(scheduler, only={"low"}).num_scheduled_tokens == {"low": 1, "high": 19}
    assert step(scheduler).num_scheduled_tokens == {"low": 1, "high": 3}
    # Both need a third block now and one is free: low, first in line, takes it, and has to give it back.
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"high": 1}
    assert output.total_num_scheduled_tokens == 1
    assert output.scheduled_cached_reqs.req_ids == ["high"]
    assert output.scheduled_cached_reqs.new_block_ids == [([5],)]
    assert output.preempted_req_ids == {"low"} and low.num_computed_tokens == 0
    scheduler.kv_cache_manager.check_integrity()


def test_withdrawn_blocks_that_a_chunk_would_have_filled_are_not_findable() -> None:
    scheduler = create_scheduler(
        policy="priority", num_blocks=7, block_size=4, max_num_batched_tokens=16, enable_prefix_caching=True
    )
    low = make_request("low", [1] * 16, block_size=4, priority=9)
    high = make_request("high", [2] * 8, block_size=4, priority=1)
    add(scheduler, low, high)
    assert step(scheduler, only={"high"}).num_scheduled_tokens == {"high": 8, "low": 8}
    scheduler.running.reverse()  # low first: it takes the last two blocks for its second chunk
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"high": 1}  # but then high needed a third block
    assert low.status == RequestStatus.PREEMPTED
    cached = scheduler.kv_cache_manager.block_pool.get_cached_block
    assert [cached(block_hash) is not None for block_hash in low.block_hashes] == [True, True, False, False]
    scheduler.kv_cache_manager.check_integrity()


def test_nobody_is_admitted_in_a_step_with_a_preemption() -> None:
    scheduler = create_scheduler(policy="priority", num_blocks=5, max_num_seqs=2)
    add(scheduler, *create_requests(2, 32, priorities=[9, 1]))
    step(scheduler)
    add(scheduler, *create_requests(1, 10, priorities=[5], start=2))
    output = step(scheduler)
    # low's seat and blocks are free, mid is next; but who was pushed out may be pushed back in only a step later.
    assert output.num_scheduled_tokens == {"1": 1}
    assert queue_ids(scheduler) == (["1"], ["2", "0"])


def test_victim_before_the_current_index_skips_nobody() -> None:
    scheduler = create_scheduler(policy="priority", num_blocks=7)
    low, mid, high = create_requests(3, 32, priorities=[9, 5, 1])
    for request in (low, mid, high):  # admitted least urgent first
        add(scheduler, request)
        output = scheduler.schedule()
    for request in (mid, high):
        request.append_output_token_ids(7)
    # low waits for its output: it comes first and has nothing to do. mid needs a block and gets low's.
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"1": 1, "2": 1}
    assert queue_ids(scheduler) == (["1", "2"], ["0"])


# --- requests that can never fit ---


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_prompt_larger_than_the_pool_ends_at_once_and_others_go_on(policy: str, use_async: bool) -> None:
    engine = FakeEngine(create_scheduler(num_blocks=5, policy=policy, use_async=use_async), depth=int(use_async))
    ok = create_requests(2, 20, ignore_eos=True)
    engine.add(ok[0], make_request("big", range(65), ignore_eos=True, arrival_time=0.5), ok[1])
    engine.run()
    big = engine.finished["big"]
    assert big.finish_reason == FinishReason.LENGTH and engine.outputs["big"] == []
    assert "5 KV cache blocks of 16" in big.stop_reason and "only 4 exist" in big.stop_reason
    for flag in ("kv_cache_memory_bytes", "num_gpu_blocks_override", "max_model_len"):
        assert flag in big.stop_reason
    for request in ok:
        assert engine.outputs[request.request_id] == expected_tokens(request, 8192)


def test_status_of_a_request_that_never_fits() -> None:
    scheduler = create_scheduler(num_blocks=5)
    request = make_request("r", range(65))
    add(scheduler, request)
    output = scheduler.schedule()
    assert request.status == RequestStatus.FINISHED_IGNORED
    assert output.total_num_scheduled_tokens == 0 and output.finished_req_ids == {"r"}
    assert not scheduler.has_unfinished_requests() and scheduler.has_finished_requests()
    assert scheduler.update_from_output(output, EMPTY_MODEL_RUNNER_OUTPUT)[0].outputs[0].finished
    assert not scheduler.has_requests()


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("num_tokens", [62, 63, 64])
def test_lone_request_that_outgrows_the_pool_keeps_its_output(num_tokens: int, use_async: bool) -> None:
    scheduler = create_scheduler(num_blocks=5, use_async=use_async)
    engine = FakeEngine(scheduler, depth=int(use_async))
    request = make_request("r", range(num_tokens), max_tokens=50, ignore_eos=True)
    engine.add(request)
    engine.run()
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert engine.outputs["r"] == expected_tokens(request, 8192, max_pool_tokens=64)
    assert len(engine.outputs["r"]) == 65 - num_tokens
    assert engine.finished["r"].finish_reason == FinishReason.LENGTH
    assert "5 KV cache blocks" in engine.finished["r"].stop_reason


# --- fairness ---


@pytest.mark.parametrize("threshold", [0, 8, 24])
@pytest.mark.parametrize("use_async", [False, True])
def test_decodes_run_every_step_while_a_long_prompt_arrives_each_step(threshold: int, use_async: bool) -> None:
    scheduler = create_scheduler(
        max_num_batched_tokens=32, max_num_seqs=8, long_prefill_token_threshold=threshold, use_async=use_async
    )
    engine = FakeEngine(scheduler, depth=int(use_async))
    decodes = create_requests(3, 4, max_tokens=60, ignore_eos=True)
    engine.add(*decodes)
    engine.step()
    for i in range(50):
        engine.add(make_request(f"long{i}", [i] * 300, max_tokens=5, ignore_eos=True))
        scheduled = engine.step().num_scheduled_tokens
        assert all(scheduled[request.request_id] == 1 for request in decodes)
        assert sum(scheduled.values()) <= 32
        # Whoever has begun to decode goes on too.
        for request in scheduler.running:
            if request.num_output_tokens and request.num_output_tokens < 4:
                assert scheduled.get(request.request_id, 0) >= 1


def test_stats() -> None:
    scheduler = create_scheduler(num_blocks=5, log_stats=True)
    add(scheduler, *create_requests(3, 32))
    output = scheduler.schedule()
    result = scheduler.update_from_output(output, make_output(output))
    stats = result[0].scheduler_stats
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage) == (2, 1, 1.0)
    assert stats.num_preempted_reqs == 0 and result[0].timestamp > 0
    scheduler.schedule()
    assert scheduler.make_stats().num_preempted_reqs == 1
    assert scheduler.make_stats().num_preempted_reqs == 0


@pytest.mark.parametrize("use_async", [False, True])
def test_a_decode_asks_the_manager_only_where_a_block_begins_or_ends(use_async: bool) -> None:
    """What keeps a step of many decodes cheap; the blocks come at the same steps as if it asked for each token."""
    scheduler = create_scheduler(use_async=use_async, enable_prefix_caching=True, block_size=8)
    manager = scheduler.kv_cache_manager
    request = make_request("r", range(10), block_size=8, max_tokens=100, ignore_eos=True)
    scheduler.add_request(request)
    output = scheduler.schedule()
    scheduler.update_from_output(output, make_output(output))
    asked = []
    allocate_slots = manager.allocate_slots

    def spy(request: Request, num_new_tokens: int) -> KVCacheBlocks | None:
        asked.append(request.num_computed_tokens)
        return allocate_slots(request, num_new_tokens)

    manager.allocate_slots = spy  # type: ignore[method-assign, assignment]
    for num_computed in range(10, 40):
        output = scheduler.schedule()
        new_blocks = output.scheduled_cached_reqs.new_block_ids[0]
        assert (new_blocks is not None) == (num_computed % 8 == 0)
        scheduler.update_from_output(output, make_output(output))
        manager.check_integrity(scheduler.running)
    assert asked == [15, 16, 23, 24, 31, 32, 39]
