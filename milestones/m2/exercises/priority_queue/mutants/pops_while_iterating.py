# killed-by: iterating_yields_the_order_and_changes_nothing | must take nothing out
"""Iterating pops the requests, so every look at the queue empties it."""

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
        while self._heap:
            yield heapq.heappop(self._heap)
