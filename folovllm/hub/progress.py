"""What a pull shows while it runs (milestone M0).

`PullProgress` draws one bar and names the stage. `QuietProgress`, which shows nothing, is used for `progress=False`, so
`pull` itself needs no `if`. rich is imported only when a bar is drawn. vLLM has no file for this: it shows the bars
of huggingface_hub.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class QuietProgress:
    """Shows nothing."""

    def __enter__(self) -> QuietProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def stage(self, text: str, total: int | None = None) -> None:
        """A new stage begins. `total` is its size in bytes, or None if unknown."""

    def reached(self, done: int) -> None:
        """`done` bytes of the present stage have arrived."""


class PullProgress(QuietProgress):
    """One line on stderr with the stage, a bar, the bytes and the time left. Finished stages stay above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        # The stream is fixed here, because the conversion redirects sys.stderr to silence other libraries.
        columns = (
            TextColumn("{task.description:<42}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[size]}"),
        )
        self._bar = Progress(*columns, console=Console(file=sys.stderr))
        self._task: Any = None
        self._total: int | None = None

    def __enter__(self) -> PullProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self._finish()
        self._bar.stop()

    def stage(self, text: str, total: int | None = None) -> None:
        self._finish()
        self._total = total
        self._task = self._bar.add_task(text, total=total, size=_megabytes(total))

    def reached(self, done: int) -> None:
        self._bar.update(self._task, completed=done, size=_megabytes(done, self._total))

    def _finish(self) -> None:
        if self._task is None:
            return
        total = self._total or 1  # a stage of unknown size still ends as a full bar
        self._bar.update(self._task, total=total, completed=total, size=_megabytes(self._total))


def _megabytes(*numbers: int | None) -> str:
    """`_megabytes(31_000_000, 93_000_000)` is "31 / 93 MB"; unknown sizes are left out."""
    known = [f"{n / 1e6:.0f}" for n in numbers if n is not None]
    return " / ".join(known) + " MB" if known else ""
