"""Raises an exception at a chosen line of the engine, as a signal handler or a bug could.

`moments_of(body)` lists every line event that `body` causes in the engine's files. Inside `interrupted(moment, error)`
that event raises `error`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import folovllm

PACKAGE = Path(folovllm.__file__).parent
TRACED = tuple(
    str(PACKAGE / name) for name in ("core/", "engine/", "executor/", "worker/", "trace/", "request.py", "outputs.py")
)

Moment = tuple[str, int, int]  # file, line number, and how many times the line has run before


@contextmanager
def _tracing(on_line: Callable[[FrameType], None]) -> Iterator[None]:
    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            on_line(frame)
        return local

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(TRACED) else None

    before = sys.gettrace()  # coverage's
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


class _Clock:
    """Counts how many times each line has run."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, int]] = Counter()

    def now(self, frame: FrameType) -> Moment:
        line = (frame.f_code.co_filename, frame.f_lineno)
        self._counts[line] += 1
        return (*line, self._counts[line] - 1)


def moments_of(body: Callable[[], object]) -> list[Moment]:
    """Every line event in the engine's files while `body` runs, in order."""
    moments: list[Moment] = []
    clock = _Clock()
    with _tracing(lambda frame: moments.append(clock.now(frame))):
        body()
    return moments


@contextmanager
def interrupted(moment: Moment, error: BaseException, spared: str = "") -> Iterator[list[Moment]]:
    """Raises `error` at `moment`, or as soon after it as no file of the folder `spared` is at work.

    The list tells when that was. It stays empty if the moment did not come.
    """
    clock, is_due, at = _Clock(), False, []

    def on_line(frame: FrameType) -> None:
        nonlocal is_due
        now = clock.now(frame)
        is_due = is_due or now == moment
        if is_due and not at and not (spared and _is_under(frame, spared)):
            at.append(now)
            raise error

    with _tracing(on_line):
        yield at


def _is_under(frame: FrameType | None, folder: str) -> bool:
    """Whether a file of this folder is being run, or has called what is."""
    while frame is not None:
        if folder in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def first_of_each(moments: list[Moment]) -> list[Moment]:
    """The first time that each line runs."""
    return [moment for moment in moments if moment[2] == 0]
