"""Where the time of quantising goes: seconds per part of the job.

Milestone: M7. vLLM counterpart: none. Parts do not overlap. The difference to the total is the time spent in no part.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

FORWARD = "forward passes"
HESSIAN = "Hessians"
INVERSE = "Cholesky and inverse"
COLUMNS = "columns"
ERRORS = "errors, GPTQ and nearest"
FILES = "reading and writing"

Item = TypeVar("Item")


class PartClock:
    """Adds up the seconds of each part. `seconds` may continue the sums of an earlier run."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields `items` and times only how long each takes to arrive."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
