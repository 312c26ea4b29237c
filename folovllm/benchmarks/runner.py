"""Running the arms: one fresh process per arm and repeat, in turn, so that drift of the machine hits all alike.

Milestone: M1. vLLM counterpart: none. No torch.

    round 1: bandwidth, hf, m1, m2     round 2: m2, m1, hf, bandwidth     round 3: as round 1

A child leads a process group of its own, and the group ends with us, however we end: by a timeout, Ctrl-C or SIGTERM
here (`children_end_with_us`), by SIGKILL through the pipe that is the child's stdin (`child.die_with_parent`).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from folovllm.benchmarks.task import ArmTask

Say = Callable[[str], None]


@dataclass
class ArmRuns:
    """What the processes of one arm answered; `error` is what its last one failed with."""

    results: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def say(text: str) -> None:
    """Progress goes to stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def run_rounds(tasks: list[ArmTask], repeats: int, timeout: float, say: Say = say) -> dict[str, ArmRuns]:
    """Run every task once per round; every second round backwards. An arm that failed is not tried again."""
    runs = {task.name: ArmRuns() for task in tasks}
    assert len(runs) == len(tasks), "two tasks of one name: give them labels"
    for round_index in range(repeats):
        for task in tasks if round_index % 2 == 0 else reversed(tasks):
            arm = runs[task.name]
            if arm.error is None:
                say(f"[round {round_index + 1}/{repeats}] {task.name} ...")
                _record(arm, task, timeout, say)
    return runs


def run_task(task: ArmTask, timeout: float) -> dict[str, Any]:
    """One task in a process of its own: its result, or {"ok": False, "error": ...}."""
    with tempfile.TemporaryDirectory(prefix="folovllm-bench-") as folder:
        task_file, result_file = Path(folder, "task.json"), Path(folder, "result.json")
        task_file.write_text(task.to_json())
        command = [sys.executable, "-m", "folovllm.benchmarks", "--arm", str(task_file), str(result_file)]
        try:
            status = run_child(command, timeout)
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"took longer than {timeout:.0f} s (--timeout) and was ended"}
        if not result_file.exists():
            return {"ok": False, "error": _how_it_died(status)}
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result


def run_child(command: list[str], timeout: float) -> int:
    """The exit status of `command`; TimeoutExpired when it took too long. Nothing it started outlives this call."""
    with (
        children_end_with_us(),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as child,
    ):
        try:
            return child.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all gone already
                os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def children_end_with_us() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise here as Ctrl-C does, so that `finally` blocks run."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _record(arm: ArmRuns, task: ArmTask, timeout: float, say: Say) -> None:
    start = time.perf_counter()
    result = run_task(task, timeout)
    if result["ok"]:
        arm.results.append(result)
        say(f"    {task.name} done in {time.perf_counter() - start:.1f} s")
    else:
        arm.error = result["error"]
        say(f"    {task.name} FAILED: {arm.error}")


def _how_it_died(status: int) -> str:
    if status == -9:
        return "its process was killed (signal 9): most likely out of memory; lower --kv-cache-memory"
    if status < 0:
        return f"its process was ended by signal {-status}"
    return f"its process ended with status {status} and left no result"
