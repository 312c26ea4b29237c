"""TraceWriter: writes the record of every step to a file.

Milestone: M2. vLLM counterpart: none.

Row 1: no torch. The records themselves are made in recorder.py.
"""

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.scheduler import Scheduler
from folovllm.trace.header import make_header
from folovllm.trace.record import VERSION, to_json
from folovllm.trace.recorder import NullTrace, Recorder

logger = logging.getLogger(__name__)


def make_trace(config: EngineConfig, kv_cache_config: KVCacheConfig) -> NullTrace:
    """What `config.trace` asks for: a TraceWriter to that file, or nothing."""
    return NullTrace() if config.trace is None else TraceWriter(config.trace, make_header(config, kv_cache_config))


class TraceWriter(Recorder):
    """Appends one line per step to `path` (overwritten). Buffered; flushed when the engine goes idle and at `close`.

    Raises ValueError if the file cannot be opened. If it cannot be written later (a full disk), or if an exception hits
    the writer in the middle of its own work, the trace ends there, with a warning: the engine goes on, and the file is
    that of a run that was cut.
    """

    def __init__(
        self, path: str | Path, header: dict[str, Any], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        try:
            self._file = open(path, "w", buffering=2**20, encoding="utf-8")  # noqa: SIM115 - lives as long as the engine
        except OSError as error:
            raise ValueError(f"cannot write the trace to {path}: {error.strerror}; choose another file") from None
        super().__init__(header, clock)
        self.emit(header)
        self.went_idle()
        _writers.add(self)

    def emit(self, line: dict[str, Any]) -> None:
        if not self._file.closed:
            with self._stopping_on_failure():
                self._file.write(to_json(line) + "\n")

    def went_idle(self) -> None:
        """Flushes what is buffered."""
        if not self._file.closed:
            with self._stopping_on_failure():
                self._file.flush()

    def recovered(self, scheduler: Scheduler) -> NullTrace:
        return NullTrace() if self._file.closed else super().recovered(scheduler)

    def lost_track(self, scheduler: Scheduler) -> NullTrace:
        """Ends the trace."""
        self._stop("an exception came while it was being written")
        return NullTrace()

    def close(self) -> None:
        """Writes the end line, which says that nothing is missing. Closing twice is fine."""
        if not self._file.closed:
            # Aborts since the last step have no record of their own any more.
            self.emit({"type": "end", "v": VERSION, "steps": self._num_steps, "events": self._events})
            self._close_file()

    @contextlib.contextmanager
    def _stopping_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._stop(f"it cannot be written: {error.strerror}")

    def _stop(self, why: str) -> None:
        """Ends the trace without an end line, as if the run had been cut here."""
        logger.warning("the trace %s ends after %d steps: %s", self._file.name, self._num_steps, why)
        self._close_file()

    def _close_file(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def detach(self) -> None:
        """In a forked child: the file is the parent's, so what is buffered here goes nowhere."""
        if not self._file.closed:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._file.fileno())
            os.close(null)


_writers: "weakref.WeakSet[TraceWriter]" = weakref.WeakSet()


def _detach_all() -> None:
    for writer in list(_writers):
        writer.detach()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_detach_all)
