"""Other work beside a measurement: processes that each keep one core busy, as a browser or a build does.

Milestone: M4. vLLM counterpart: none. Each process runs in a session of its own, as another program on a desktop does.
If autogroups are on, Linux divides a core first between sessions and then between the threads of a session. An engine
then feels a busy process more than it would if both had been started from one terminal.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from folovllm.benchmarks.runner import end_group, start_child
from scripts.peers.catalog import PeerError

AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
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


def divides_by_session() -> bool | None:
    """Whether this machine divides a core between sessions first. Returns None if the kernel does not say."""
    return AUTOGROUP.read_text().strip() == "1" if AUTOGROUP.exists() else None
