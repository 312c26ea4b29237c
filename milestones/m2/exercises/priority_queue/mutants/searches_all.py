# killed-by: adding_and_popping_take_few_comparisons | makes a long queue slow
"""The queue is a plain list, and each pop looks through all of it for the smallest.

With 10,000 waiting requests the search takes longer than the model's step.
"""

from collections.abc import Iterable, Iterator

from folovllm.core.sched.request_queue import PriorityRequestQueue as ReferenceQueue
from folovllm.request import Request


class PriorityRequestQueue(ReferenceQueue):
    def add_request(self, request: Request) -> None:
        self._heap.append(request)

    def peek_request(self) -> Request:
        if not self._heap:
            raise IndexError("no request waits")
        return min(self._heap)

    def pop_request(self) -> Request:
        request = self.peek_request()
        self._heap.remove(request)
        return request

    def remove_requests(self, requests: Iterable[Request]) -> None:
        gone = {id(request) for request in requests}
        self._heap = [request for request in self._heap if id(request) not in gone]

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._heap))
