"""The worker process of a grading: started, listened to, and ended if a check hangs or the process dies.

Milestone: M0. vLLM counterpart: none.

The learner's code runs in the worker, so an endless loop or a crash is a result and not the end of `folovllm learn`.
The worker itself interrupts a loop in Python; one inside C code is ended from here, a little later.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from folovllm.learn.exercise import Exercise
from folovllm.learn.grade import FAILED, Result, seconds_for

GRACE = 5.0  # seconds that the worker gets to interrupt the check itself
START_SECONDS = 60.0  # until the first line: Python and the imports on a busy machine
CAUSES = {signal.SIGSEGV: "a crash in C code", getattr(signal, "SIGKILL", None): "probably there was no memory left"}
MAX_ERRORS = 4000  # bytes: the last that the worker wrote to stderr


def grade_in_worker(exercise: Exercise, path: Path) -> Iterator[Result]:
    """Yields the results of `grade` as they come. The last one tells of a hang or a crash, if there was one."""
    yield from results_of([sys.executable, "-m", "folovllm.learn.grade", str(exercise.folder), str(path)])


def results_of(command: list[str]) -> Iterator[Result]:
    """Runs a worker process that prints results as `folovllm.learn.grade` does, and yields them.

    It has a session of its own, so that its children can be ended with it: they may hold its pipes open. Its stdin is
    empty, so that `input()` in the learner's code is an error and does not wait.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        yield from _results(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.wait()


def _results(process: subprocess.Popen[bytes]) -> Iterator[Result]:
    assert process.stdout is not None and process.stderr is not None
    lines: queue.Queue[bytes] = queue.Queue()
    errors: deque[bytes] = deque(maxlen=MAX_ERRORS // 100)
    _read(process.stdout, lines.put)
    reader = _read(process.stderr, errors.append, 100)
    running, seconds = Result("contract", "contract", FAILED), START_SECONDS
    try:
        while line := lines.get(timeout=seconds):
            record = json.loads(line)
            if "end" in record:
                return
            if "begin" in record:
                running = Result(**record["begin"])
                seconds = seconds_for(running.level, running.limit) + GRACE
            else:
                yield Result(**record)
        returncode = process.wait()
        reader.join(GRACE)
        yield replace(running, message=_crash(returncode, b"".join(errors).decode("utf-8", errors="replace")))
    except queue.Empty:
        yield replace(running, message=f"The check did not end within {seconds:.0f} seconds, and was stopped.")


def _read(stream: IO[bytes], take: Callable[[bytes], object], size: int = -1) -> threading.Thread:
    """Gives `take` the lines of a pipe, or pieces of `size` bytes, and b"" at its end, in a thread of its own: no pipe
    fills up, and every wait can have an end.
    """

    def run() -> None:
        with stream:
            while line := stream.readline(size):
                take(line)
            take(b"")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _crash(returncode: int, errors: str) -> str:
    """How the worker ended. A negative exit code is that of a signal."""
    if returncode < 0:
        name = signal.Signals(-returncode)
        return f"The process that runs your code was ended by {name.name} ({CAUSES.get(name, 'a signal')})."
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "").strip()
    return f"The process that runs your code ended here with exit code {returncode}. {last}".rstrip()
