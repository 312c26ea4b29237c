"""Exercise m2/priority_queue: the waiting requests in order of urgency. `prepend_request`, inherited, calls your
`add_request`.
"""

from collections.abc import Iterable, Iterator

from folovllm.core.sched.request_queue import PriorityRequestQueue as ReferenceQueue
from folovllm.request import Request


class PriorityRequestQueue(ReferenceQueue):
    """`self._heap` is an empty list at first. Keep the requests in it, in any form you like."""

    def add_request(self, request: Request) -> None:
        """Takes in a waiting request, with O(log n) comparisons."""
        raise NotImplementedError("m2/priority_queue: add_request")

    def peek_request(self) -> Request:
        """Returns the request with the smallest `sort_key()` and leaves it in. Raises IndexError if none waits."""
        raise NotImplementedError("m2/priority_queue: peek_request")

    def pop_request(self) -> Request:
        """Takes out and returns the request with the smallest `sort_key()`. Raises IndexError if none waits."""
        raise NotImplementedError("m2/priority_queue: pop_request")

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Takes out these objects, wherever they are. Requests that do not wait are ignored."""
        raise NotImplementedError("m2/priority_queue: remove_requests")

    def __len__(self) -> int:
        """Returns how many requests wait."""
        raise NotImplementedError("m2/priority_queue: __len__")

    def __iter__(self) -> Iterator[Request]:
        """Yields the waiting requests in the order in which they would be popped, and changes nothing."""
        raise NotImplementedError("m2/priority_queue: __iter__")
