# killed-by: iterating_yields_the_order_and_changes_nothing | the list of a heap is not sorted
"""Iterating yields the list that the heap is kept in, whose order is not the order of popping."""

import heapq
from collections.abc import Iterable, Iterator

from folovllm.core.sched.request_queue import PriorityRequestQueue as ReferenceQueue
from folovllm.request import Request


class PriorityRequestQueue(ReferenceQueue):
    def add_request(self, request: Request) -> None:
        heapq.heappush(self._heap, request)

    def peek_request(self) -> Request:
        return self._heap[0]

    def pop_request(self) -> Request:
        return heapq.heappop(self._heap)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        gone = {id(request) for request in requests}
        self._heap = [request for request in self._heap if id(request) not in gone]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._heap))
