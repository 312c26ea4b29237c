"""Small helpers that several parts need: arithmetic, suggestions for a misspelled name, memory, ends of processes.

Milestone: M0. vLLM counterpart: vllm/utils/__init__.py. Left out: helpers that a single file uses, which belong into
that file.

Row 0: no torch.
"""

import contextlib
import difflib
import math
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `number`."""
    return cdiv(number, multiple) * multiple


def percentile(values: Iterable[float], q: float) -> float | None:
    """The q-th percentile (0..100), linear between neighbours; None of nothing. E.g. [1, 2, 3, 4] at 50 -> 2.5."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * q / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


# ---- suggestions


def nearest_name(name: object, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Returns the one of `known` that looks most like `name`, or None if none reaches `cutoff` (0 to 1)."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Returns the end of an error message, "; did you mean 'float16'?", or "" if nothing is near."""
    near = nearest_name(name, known, cutoff)
    return "" if near is None else f"; did you mean {near!r}?"


def unknown_name_message(kind: str, name: str, known: Iterable[str], meant: str | None = None) -> str:
    """Returns one line that refuses `name` and suggests the known one that is nearest to it, or to what it `meant`."""
    known = list(known)
    return f"unknown {kind} {name!r}" + (did_you_mean(meant or name, known) or f"; known: {', '.join(known)}")


# ---- memory


def available_memory_bytes() -> int:
    """Returns the memory of this machine that programs can still take without swapping."""
    import psutil  # here and not above: the rows without torch run where psutil is not installed, too

    return int(psutil.virtual_memory().available)


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has held so far, plus the same of the processes that it has started.

    Those are the ranks of a model; one that has ended does not count. Where the system does not report a peak (macOS),
    what a process holds now stands for it.
    """
    import psutil

    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error, OSError):  # the process has ended meanwhile
            total += _peak_of(process)
    return total


def _peak_of(process: "psutil.Process") -> int:
    status = Path(f"/proc/{process.pid}/status")
    # Not getrusage's ru_maxrss: it starts at the peak of the process that started this one.
    high_water = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    return int(high_water[1]) * 1024 if high_water is not None else int(process.memory_info().rss)


# ---- processes


def cause_of_death(exit_code: int | None, who: str = "the engine process") -> str:
    """How a process ended, as a sentence about `who`."""
    if exit_code is None:
        return f"{who} does not answer"
    if exit_code >= 0:
        return f"{who} ended with exit status {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; if the machine ran out of memory, its kernel's log says so" if name == "SIGKILL" else ""
    return f"{who} was killed by {name}{hint}"
