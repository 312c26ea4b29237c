# killed-by: removal_keeps_the_order_of_the_rest | a heap with a hole in it is no heap any more
"""A request is taken out by putting the last one into its place, and the heap is not mended.

Every queue that is emptied from the middle invites it; vLLM's calls heapify after list.remove, and pull 39495 is
about what that costs under many aborts.
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
        gone = {id(request) for request in requests}
        for i in reversed(range(len(self._heap))):
            if id(self._heap[i]) in gone:
                self._heap[i] = self._heap[-1]
                self._heap.pop()

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._heap))
