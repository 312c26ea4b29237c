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
from dataclasses import replace
from pathlib import Path
from typing import IO

from folovllm.learn.exercise import Exercise
from folovllm.learn.grade import FAILED, Result, seconds_for

GRACE = 5.0  # seconds that the worker gets to interrupt the check itself
START_SECONDS = 60.0  # until the first line: Python and the imports on a busy machine
CAUSES = {signal.SIGSEGV: "a crash in C code", getattr(signal, "SIGKILL", None): "probably there was no memory left"}

Lines = queue.Queue[str | None]  # of a pipe as they come in, and None at its end


def grade_in_worker(exercise: Exercise, path: Path) -> Iterator[Result]:
    """Yields the results of `grade` as they come. The last one tells of a hang or a crash, if there was one."""
    yield from results_of([sys.executable, "-m", "folovllm.learn.grade", str(exercise.folder), str(path)])


def results_of(command: list[str]) -> Iterator[Result]:
    """Runs a worker process that prints results as `folovllm.learn.grade` does, and yields them."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield from _results(process)
        finally:
            process.kill()  # if it has not ended


def _results(process: subprocess.Popen[bytes]) -> Iterator[Result]:
    assert process.stdout is not None and process.stderr is not None
    lines, errors = _read(process.stdout), _read(process.stderr)
    running, seconds = Result("contract", "contract", FAILED), START_SECONDS
    try:
        while (line := lines.get(timeout=seconds)) is not None:
            record = json.loads(line)
            if "end" in record:
                return
            if "begin" in record:
                running = Result(**record["begin"])
                seconds = seconds_for(running.level) + GRACE
            else:
                yield Result(**record)
        yield replace(running, message=_crash(process.wait(), errors))
    except queue.Empty:
        yield replace(running, message=f"The check did not end within {seconds:.0f} seconds, and was stopped.")


def _read(stream: IO[bytes]) -> Lines:
    """Reads a pipe in a thread of its own, so that no pipe fills up and every wait can have an end."""
    lines: Lines = queue.Queue()

    def run() -> None:
        for line in stream:
            lines.put(line.decode("utf-8", errors="replace"))
        lines.put(None)

    threading.Thread(target=run, daemon=True).start()
    return lines


def _crash(returncode: int, errors: Lines) -> str:
    """How the worker ended. A negative exit code is that of a signal."""
    if returncode < 0:
        name = signal.Signals(-returncode)
        return f"The process that runs your code was ended by {name.name} ({CAUSES.get(name, 'a signal')})."
    last = ""
    while (line := errors.get()) is not None:
        last = line.strip() or last
    return f"The process that runs your code ended here with exit code {returncode}. {last}".rstrip()
