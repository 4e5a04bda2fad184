"""Waiting requests in order: first come first served, or by priority (vLLM: `core/sched/request_queue.py`).

Ten thousand requests may wait here while clients give up at any moment, so removing one from the middle is
O(1) in both queues (vLLM's are O(n) there).
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import islice

from folovllm.request import Request


class SchedulingPolicy(Enum):
    """Who runs first, and who is preempted last."""

    FCFS = "fcfs"
    PRIORITY = "priority"


class RequestQueue(ABC):
    """A queue of distinct requests; iterates in scheduling order without changing anything."""

    @abstractmethod
    def add_request(self, request: Request) -> None:
        """Add a new request."""

    @abstractmethod
    def prepend_request(self, request: Request) -> None:
        """Put back a request that has been running: before all others, unless the policy orders them."""

    @abstractmethod
    def peek_request(self) -> Request:
        """Return the next request; IndexError where there is none."""

    @abstractmethod
    def pop_request(self) -> Request:
        """Remove and return the next request; IndexError where there is none."""

    @abstractmethod
    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove these requests; those that are not here are ignored."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Request]: ...

    def __bool__(self) -> bool:
        return len(self) > 0

    def remove_request(self, request: Request) -> None:
        """Remove one request, if it is here."""
        self.remove_requests((request,))


class FCFSRequestQueue(RequestQueue):
    """First come, first served. An ordered dict is a deque that can forget a key in its middle in O(1)."""

    def __init__(self) -> None:
        self._requests: OrderedDict[Request, None] = OrderedDict()

    def add_request(self, request: Request) -> None:
        """Add at the end."""
        self._requests[request] = None

    def prepend_request(self, request: Request) -> None:
        """Add at the front."""
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)

    def peek_request(self) -> Request:
        """Return the first request."""
        return self[0]

    def pop_request(self) -> Request:
        """Remove and return the first request."""
        if not self._requests:
            raise IndexError("pop from an empty queue")
        return self._requests.popitem(last=False)[0]

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove these requests, wherever they stand."""
        for request in requests:
            self._requests.pop(request, None)

    def __getitem__(self, index: int) -> Request:
        """Return the request at `index`, 0 being the next one; O(index)."""
        position = index + len(self) if index < 0 else index
        for request in islice(self._requests, max(position, 0), None):
            if position >= 0:
                return request
        raise IndexError(f"index {index} in a queue of {len(self)} requests")

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)


class PriorityRequestQueue(RequestQueue):
    """Smallest (priority, arrival_time, request_id) first: a heap.

    Removal from the middle only notes the request; its entry is dropped when it surfaces, or when such
    entries outnumber the live ones.
    """

    def __init__(self) -> None:
        self._heap: list[Request] = []
        self._removed: set[Request] = set()

    def add_request(self, request: Request) -> None:
        """Add at the place its priority gives it."""
        if request in self._removed:
            self._removed.remove(request)  # its old entry is still in the heap
        else:
            heapq.heappush(self._heap, request)

    def prepend_request(self, request: Request) -> None:
        """The same as add_request: here the order decides, not the history."""
        self.add_request(request)

    def peek_request(self) -> Request:
        """Return the most urgent request."""
        self._drop_removed()
        return self._heap[0]

    def pop_request(self) -> Request:
        """Remove and return the most urgent request."""
        self._drop_removed()
        return heapq.heappop(self._heap)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove these requests, each of which must be here."""
        self._removed.update(requests)
        if 2 * len(self._removed) > len(self._heap):
            self._heap = [request for request in self._heap if request not in self._removed]
            heapq.heapify(self._heap)
            self._removed.clear()

    def _drop_removed(self) -> None:
        while self._heap and self._heap[0] in self._removed:
            self._removed.remove(heapq.heappop(self._heap))

    def __len__(self) -> int:
        return len(self._heap) - len(self._removed)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(request for request in self._heap if request not in self._removed))


def create_request_queue(policy: SchedulingPolicy) -> RequestQueue:
    """Return an empty queue for `policy`."""
    return PriorityRequestQueue() if policy is SchedulingPolicy.PRIORITY else FCFSRequestQueue()
