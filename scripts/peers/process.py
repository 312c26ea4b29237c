"""Children that never outlive us: not on Ctrl-C, not on a timeout, not when this process is killed.

Milestone: M4. vLLM counterpart: none. Peers start processes of their own (vLLM an engine, pip a compiler), so a child
is a session, and what is ended is always the whole process group.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

GUARD = Path(__file__).with_name("guard.py")
TAIL_LINES, TAIL_CHARS = 12, 1500


def run_guarded(command: Sequence[str], log: Path, timeout: float, variables: Mapping[str, str] | None = None) -> int:
    """Run `command` with its output appended to `log`; its exit status (128 + n for signal n).

    Raises `TimeoutError` after `timeout` seconds; whatever happens, no process of the command is left.
    """
    guarded = [sys.executable, "-I", "-S", str(GUARD), *command]
    with log.open("ab") as out:
        process = subprocess.Popen(
            guarded,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **(variables or {})},
        )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"took longer than {timeout:.0f} s and was ended") from None
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the group: after a clean end that is nothing, or something the command forgot."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM where all are dead
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within, SIGTERM unwinds like Ctrl-C, so that children end and temporary folders go."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tail(log: Path) -> str:
    """The last lines of a log, for an error message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL_LINES:])[-TAIL_CHARS:]
