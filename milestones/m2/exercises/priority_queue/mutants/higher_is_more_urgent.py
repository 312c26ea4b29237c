# killed-by: the_smallest_number_is_the_head | a lower number is more urgent
"""The largest number is taken for the most urgent one.

Both conventions exist: in vLLM lower values go first, in many job schedulers higher ones do.
"""

import heapq
from collections.abc import Iterable, Iterator

from folovllm.core.sched.request_queue import PriorityRequestQueue as ReferenceQueue
from folovllm.request import Request


class _Entry:
    def __init__(self, request: Request) -> None:
        self.request = request

    def __lt__(self, other: "_Entry") -> bool:
        return (-self.request.priority, *self.request.sort_key()) < (-other.request.priority, *other.request.sort_key())


class PriorityRequestQueue(ReferenceQueue):
    def add_request(self, request: Request) -> None:
        heapq.heappush(self._heap, _Entry(request))

    def peek_request(self) -> Request:
        return self._heap[0].request

    def pop_request(self) -> Request:
        return heapq.heappop(self._heap).request

    def remove_requests(self, requests: Iterable[Request]) -> None:
        gone = {id(request) for request in requests}
        self._heap = [entry for entry in self._heap if id(entry.request) not in gone]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (entry.request for entry in sorted(self._heap))
