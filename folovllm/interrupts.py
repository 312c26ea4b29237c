"""HeldInterrupts: Ctrl-C waits until a step is over, so that it never leaves one half done.

Milestone: M1. vLLM counterpart: none; its engine core is another process, which Ctrl-C does not reach.

Row 0: no torch. Python runs signal handlers in the main thread only, between two instructions. So in other threads, and
if SIGINT has no handler written in Python, nothing is held.
"""

import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

Handler = Callable[[int, FrameType | None], Any]


class HeldInterrupts:
    """Holds SIGINT back while a `with` block runs. At its end the caller's own handler gets what has come meanwhile.

    With `patience` 1 the first Ctrl-C is held and the second one is delivered at once: it interrupts a step that does
    not come to its end. With `patience` None all are held. `count` is how many are held; `clear` drops them.
    """

    _installed: Handler | None = None

    def __init__(self, patience: int | None = 1) -> None:
        self.patience = patience
        self._held: list[FrameType | None] = []
        self._previous: Handler | None = None

    @property
    def count(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        self._held.clear()

    def __enter__(self) -> Self:
        previous = signal.getsignal(signal.SIGINT)
        # SIG_IGN and SIG_DFL have nothing to call; None is a handler that is not Python's and could not be restored.
        if threading.current_thread() is threading.main_thread() and callable(previous):
            self._previous, self._installed = previous, _handler(self, previous)
            try:
                signal.signal(signal.SIGINT, self._installed)
                return self
            except BaseException:  # another signal's handler may raise just here
                self._restore()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            try:
                self._restore()
            except BaseException:  # `signal.signal` runs the handlers of other signals first
                self._restore()
                raise
            self.deliver()

    def __del__(self) -> None:
        """Restores the caller's handler if an exception came before the first line of `__exit__`."""
        if self._installed is not None and threading.current_thread() is threading.main_thread():
            self._restore()

    def _restore(self) -> None:
        if signal.getsignal(signal.SIGINT) is self._installed:
            signal.signal(signal.SIGINT, self._previous)
        self._installed = None

    def _on_signal(self, frame: FrameType | None) -> None:
        self._held.append(frame)
        if self.patience is not None and len(self._held) > self.patience:
            self.deliver()

    def deliver(self) -> None:
        """Calls the caller's handler once for each signal held so far. If it raises, the rest is dropped."""
        held, self._held = self._held, []
        for frame in held:
            assert self._previous is not None
            self._previous(signal.SIGINT, frame)


def _handler(interrupts: HeldInterrupts, previous: Handler) -> Handler:
    """The handler to install. It does not keep `interrupts` alive.

    If `__exit__` could not restore the handler, this one stays installed until `interrupts` is collected. If that
    happens in another thread, it stays for good, and every signal goes on to `previous`: nothing is lost.
    """
    alive = weakref.ref(interrupts)

    def on_signal(number: int, frame: FrameType | None) -> None:
        interrupts = alive()
        if interrupts is None:
            previous(number, frame)
        else:
            interrupts._on_signal(frame)

    return on_signal
