"""quiet_machine: whether other programs compute on this machine, before and during a measurement of speed.

Milestone: M9. vLLM counterpart: none.

A load average tells of the last minutes, not of now, so it can be high on a machine that is quiet again. This module
counts processor time instead: that of all processes, without the share of this one and of the children that it has
waited for.

    quiet = QuietMachine(allow_busy=False)     # SystemExit if others compute now
    ...                                        # the measurement, which ends with all children waited for
    header = machine_header() | quiet.facts()
"""

import os
import sys
import time
from typing import Any

import psutil

LISTEN_SECONDS = 5.0
MOST = 0.1  # of all cores: what others may take without a warning


class QuietMachine:
    """Listens before a measurement, and counts during it."""

    def __init__(self, allow_busy: bool, seconds: float = LISTEN_SECONDS) -> None:
        """Raises SystemExit if others take more than MOST of the cores now, unless `allow_busy`."""
        began = processor_times()
        time.sleep(seconds)
        self.before = others_share(began, processor_times())
        if self.before > MOST:
            said = f"other programs take {self.before:.0%} of the cores"
            if not allow_busy:
                raise SystemExit(f"{said}: end them or wait, or give --allow-busy and do not publish the result")
            print(f"warning: {said}, so do not publish the result", file=sys.stderr)
        self._began = processor_times()

    def facts(self) -> dict[str, Any]:
        """What the result file says about others: their share of the cores before and during the measurement."""
        during = others_share(self._began, processor_times())
        if during > MOST:
            print(f"warning: other programs took {during:.0%} of the cores meanwhile: measure again", file=sys.stderr)
        return {"others_before": round(self.before, 3), "others_during": round(during, 3)}


def processor_times() -> tuple[float, float, float]:
    """The time now, and the processor time of everything on this machine, and of this process with its children."""
    total, own = psutil.cpu_times(), os.times()
    idle = total.idle + getattr(total, "iowait", 0.0)
    # guest time is a part of user time
    busy = sum(total) - idle - getattr(total, "guest", 0.0) - getattr(total, "guest_nice", 0.0)
    return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system


def others_share(began: tuple[float, float, float], ended: tuple[float, float, float]) -> float:
    """The share of all cores that others took. E.g. 10 s, 2 cores, 6 s busy of which 1 s was ours: 0.25."""
    seconds, busy, own = (after - before for before, after in zip(began, ended, strict=True))
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))
