"""Waiting queues: first come first served, and by priority."""

from __future__ import annotations

import random

import pytest

from folovllm.core.sched.request_queue import (
    FCFSRequestQueue,
    PriorityRequestQueue,
    RequestQueue,
    SchedulingPolicy,
    create_request_queue,
)
from folovllm.core.sched.utils import remove_all
from folovllm.request import Request
from tests.core_utils import (
    create_requests,
)


def test_fcfs_queue_order_and_index() -> None:
    queue = create_request_queue(SchedulingPolicy.FCFS)
    assert isinstance(queue, FCFSRequestQueue)
    a, b, c, d = create_requests(4)
    for request in (a, b, c):
        queue.add_request(request)
    queue.prepend_request(d)
    assert list(queue) == [d, a, b, c] and len(queue) == 4 and queue
    assert [queue[i] for i in (0, 1, 3, -1, -4)] == [d, a, c, c, d]
    queue.remove_request(a)
    queue.remove_requests([c, a])
    assert queue.peek_request() is d
    assert [queue.pop_request(), queue.pop_request()] == [d, b]
    assert not queue
    for refused in (queue.pop_request, queue.peek_request, lambda: queue[-1]):
        with pytest.raises(IndexError):
            refused()


def test_priority_queue_order_is_priority_then_arrival_then_id() -> None:
    queue = create_request_queue(SchedulingPolicy.PRIORITY)
    requests = create_requests(5, priorities=[2, 1, 1, 1, 0], arrival_times=[1, 3, 2, 2, 9])
    for request in requests:
        queue.add_request(request)
    assert [r.request_id for r in queue] == ["4", "2", "3", "1", "0"]
    first = queue.pop_request()
    queue.prepend_request(first)  # no history, only order
    assert [queue.pop_request().request_id for _ in range(5)] == ["4", "2", "3", "1", "0"]
    for refused in (queue.pop_request, queue.peek_request):
        with pytest.raises(IndexError):
            refused()


@pytest.mark.parametrize("policy", list(SchedulingPolicy))
def test_queues_equal_a_plain_list_under_random_operations(policy: SchedulingPolicy) -> None:
    rng = random.Random(1)
    requests = create_requests(
        30, priorities=[rng.randrange(3) for _ in range(30)], arrival_times=[rng.randrange(3) for _ in range(30)]
    )
    queue: RequestQueue = create_request_queue(policy)
    model: list[Request] = []
    for _ in range(3000):
        outside = [r for r in requests if r not in model]
        action = rng.randrange(4)
        if action == 0 and outside:
            request = rng.choice(outside)
            queue.add_request(request)
            model.append(request)
        elif action == 1 and outside:
            request = rng.choice(outside)
            queue.prepend_request(request)
            model.insert(0, request)
        elif action == 2 and model:
            if isinstance(queue, PriorityRequestQueue):
                model.sort()
            assert queue.peek_request() is model[0]
            assert queue.pop_request() is model.pop(0)
        elif action == 3:
            gone = rng.sample(model, min(len(model), rng.randrange(3)))
            queue.remove_requests(gone)
            model = [r for r in model if r not in gone]
        if isinstance(queue, PriorityRequestQueue):
            model.sort()
        assert list(queue) == model
        assert len(queue) == len(model) and bool(queue) == bool(model)


def test_remove_all() -> None:
    a, b, c = create_requests(3)
    assert remove_all([a, b, c], {b}) == [a, c]
    assert remove_all([a, c], {b}) == [a, c]
    assert remove_all([a, b, c], {a, c}) == [b]
