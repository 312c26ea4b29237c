"""The worker process of a grading: started, listened to, and ended if a check hangs or the process dies.

Milestone: M0. vLLM counterpart: none.

The learner's code runs in the worker, so an endless loop or a crash is a result and not the end of `folovllm learn`.
The worker itself interrupts a loop in Python; one inside C code is ended from here, a little later.
"""

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from folovllm.learn.exercise import Exercise
from folovllm.learn.grade import FAILED, Result, seconds_for

GRACE = 5.0  # seconds that the worker gets to interrupt the check itself
START_SECONDS = 60.0  # until the first line: Python and the imports on a busy machine


def grade_in_worker(exercise: Exercise, path: Path) -> Iterator[Result]:
    """Yields the results of `grade` as they come. The last one tells of a hang or a crash, if there was one."""
    command = [sys.executable, "-m", "folovllm.learn.grade", str(exercise.folder), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        lines, errors = _read(process.stdout), _read(process.stderr)
        level, check, seconds, ended = "contract", "contract", START_SECONDS, False
        try:
            while (line := lines.get(timeout=seconds)) is not None:
                record = json.loads(line)
                if "begin" in record:
                    level, check = record["level"], record["begin"]
                    seconds = seconds_for(level) + GRACE
                else:
                    yield Result(**record)
            ended = True
        except queue.Empty:
            yield Result(level, check, FAILED, f"it did not end within {seconds:.0f} seconds, and was stopped")
            return
        finally:
            if not ended:
                process.kill()
        if process.wait():
            yield Result(level, check, FAILED, _crash(process.returncode, _rest(errors)))


def _read(stream: IO[bytes]) -> "queue.Queue[str | None]":
    """The lines of a pipe as they come in, and None at its end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def run() -> None:
        for line in stream:
            lines.put(line.decode("utf-8", errors="replace"))
        lines.put(None)

    threading.Thread(target=run, daemon=True).start()
    return lines


def _rest(lines: "queue.Queue[str | None]") -> list[str]:
    found = []
    while (line := lines.get()) is not None:
        found.append(line.rstrip())
    return found


def _crash(returncode: int, errors: list[str]) -> str:
    """How the worker ended. A negative exit code is that of a signal: a crash in C code, or no memory left."""
    if returncode < 0:
        return f"the process that runs your code was ended by {signal.Signals(-returncode).name}"
    return (
        f"the process that runs your code ended with exit code {returncode}: {errors[-1] if errors else 'no message'}"
    )
