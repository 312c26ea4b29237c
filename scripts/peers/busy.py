"""Other work beside a measurement: processes that each keep one core busy, as a browser or a build does.

Milestone: M4. vLLM counterpart: none. Each process runs in a session of its own. Linux divides a core first between
sessions, if autogroups are on, and then between the threads of a session; two desktop programs also meet in this way.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from folovllm.benchmarks.runner import end_group, start_child
from scripts.peers.catalog import PeerError

SPIN = (sys.executable, "-I", "-S", "-c", "while True: pass")


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps `count` processes busy while the body runs. Raises PeerError if one of them ended before the body did."""
    started = [start_child(SPIN) for _ in range(count)]
    try:
        yield
        if any(process.poll() is not None for process in started):
            raise PeerError("a busy process beside the measurement was ended from outside; measure again")
    finally:
        for process in started:
            end_group(process)
