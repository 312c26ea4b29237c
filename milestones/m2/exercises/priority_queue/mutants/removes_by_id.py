# killed-by: removal_goes_by_object_not_by_id | its client would wait forever
"""Requests are removed by their ids. A client that aborts a request and sends another one under the same id loses
both.
"""

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
        gone = {request.request_id for request in requests}
        self._heap = [request for request in self._heap if request.request_id not in gone]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._heap))
