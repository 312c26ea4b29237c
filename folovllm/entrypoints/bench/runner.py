"""Running the arms: one fresh process per arm and repeat, in turn, so that drift of the machine hits all alike.

Milestone: M1. vLLM counterpart: none. No torch.

    round 1: bandwidth, hf, m1, m2     round 2: m2, m1, hf, bandwidth     round 3: as round 1
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folovllm.entrypoints.bench.task import ArmTask

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
    runs = {task.arm: ArmRuns() for task in tasks}
    for round_index in range(repeats):
        for task in tasks if round_index % 2 == 0 else reversed(tasks):
            arm = runs[task.arm]
            if arm.error is None:
                say(f"[round {round_index + 1}/{repeats}] {task.arm} ...")
                _record(arm, task, timeout, say)
    return runs


def run_task(task: ArmTask, timeout: float) -> dict[str, Any]:
    """One task in a process of its own: its result, or {"ok": False, "error": ...}."""
    with tempfile.TemporaryDirectory(prefix="folovllm-bench-") as folder:
        task_file, result_file = Path(folder, "task.json"), Path(folder, "result.json")
        task_file.write_text(task.to_json())
        command = [sys.executable, "-m", "folovllm.entrypoints.bench", "--arm", str(task_file), str(result_file)]
        try:
            status = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"took longer than {timeout:.0f} s (--timeout) and was ended"}
        if not result_file.exists():
            return {"ok": False, "error": _how_it_died(status)}
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result


def _record(arm: ArmRuns, task: ArmTask, timeout: float, say: Say) -> None:
    start = time.perf_counter()
    result = run_task(task, timeout)
    if result["ok"]:
        arm.results.append(result)
        say(f"    {task.arm} done in {time.perf_counter() - start:.1f} s")
    else:
        arm.error = result["error"]
        say(f"    {task.arm} FAILED: {arm.error}")


def _how_it_died(status: int) -> str:
    if status == -9:
        return "its process was killed (signal 9): most likely out of memory; lower --kv-cache-memory"
    if status < 0:
        return f"its process was ended by signal {-status}"
    return f"its process ended with status {status} and left no result"
