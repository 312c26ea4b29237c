"""Running the arms: a fresh process per arm and repeat, the arms in turn, so that drift of the machine hits all alike.

Milestone: M1. vLLM counterpart: none. No torch in the parent. A round goes bandwidth, hf, m1, m2, the next backwards.
A fresh process for each measurement keeps the arms apart: no memory, thread pool or compiled kernel of one helps or
hurts another, and peak memory is the arm's own. A process reads its task from one JSON file and writes its result to
another: `ask` is the parent's end, `answer` the child's. No child outlives its parent, however the parent ends
(guard.py).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from folovllm.benchmarks import metrics
from folovllm.benchmarks.arms import BANDWIDTH, BASELINE, WEIGHTS, Arm, ArmTask, EngineArm, Run
from folovllm.benchmarks.machine import describe_device, measure_bandwidth
from folovllm.benchmarks.metrics import ArmRuns
from folovllm.benchmarks.random_model import write_checkpoint
from folovllm.benchmarks.workloads import BenchRequest, Feed, one_by_one
from folovllm.config import DTYPE_BYTES
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.utils import peak_memory_bytes

GUARD = Path(__file__).with_name("guard.py")
ARM_COMMAND = (sys.executable, "-m", "folovllm.benchmarks.runner")
Result = dict[str, Any]


def say(text: str) -> None:
    """Progress goes to stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def run_rounds(tasks: list[ArmTask], repeats: int, timeout: float) -> dict[str, ArmRuns]:
    """Run every task once per round; every second round backwards. An arm that failed is not tried again."""
    runs = {task.name: ArmRuns() for task in tasks}
    assert len(runs) == len(tasks), "two tasks of one name: give them labels"
    for index in range(repeats):
        for task in tasks if index % 2 == 0 else reversed(tasks):
            if runs[task.name].error is None:
                say(f"[round {index + 1}/{repeats}] {task.name} ...")
                start, result = time.perf_counter(), run_task(task, timeout)
                if result["ok"]:
                    runs[task.name].results.append(result)
                    say(f"    {task.name} done in {time.perf_counter() - start:.1f} s")
                else:
                    runs[task.name].error = result["error"]
                    say(f"    {task.name} FAILED: {result['error']}")
    return runs


def run_task(task: ArmTask, timeout: float) -> Result:
    """The result of one task in a process of its own, or {"ok": False, "error": ...}."""
    return ask(ARM_COMMAND, task.to_json(), timeout)


# ---- processes


def ask(
    command: Sequence[str],
    task: str,
    timeout: float,
    quiet: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Result:
    """Run `command TASK_FILE RESULT_FILE`; the result that it wrote, or {"ok": False, "error": ...}.

    If `quiet`, the command's output is not shown, and the end of it becomes part of the error. `variables` are
    environment variables beside ours.
    """
    with tempfile.TemporaryDirectory(prefix="folovllm-bench-") as folder:
        task_file, result_file, log = (Path(folder, name) for name in ("task.json", "result.json", "log"))
        task_file.write_text(task)
        try:
            status = run_child([*command, str(task_file), str(result_file)], timeout, log if quiet else None, variables)
            error = None if result_file.exists() else f"its process ended with status {status} and left no result"
            if status == 128 + signal.SIGKILL:
                error = "its process was killed (signal 9): most likely out of memory; lower --kv-cache-memory"
        except TimeoutError as timed_out:
            error = f"{timed_out} (--timeout)"
        result: Result = {"ok": False, "error": error} if error else json.loads(result_file.read_text())
        if quiet and not result["ok"]:
            result["error"] += f"; the end of its log:\n{tail(log)}"
        return result


def run_child(
    command: Sequence[str], timeout: float, log: Path | None = None, variables: Mapping[str, str] | None = None
) -> int:
    """Run `command` in a session of its own; its exit status (128 + n for signal n).

    Its output is appended to `log`; without one, its stderr is ours. Raises TimeoutError after `timeout` seconds.
    However this ends, no process that the command started is left.
    """
    process = start_child(command, log, variables)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"took longer than {timeout:.0f} s and was ended") from None
    finally:
        end_group(process)


def start_child(
    command: Sequence[str], log: Path | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts `command` in a session of its own, which ends with this process. Close it with `end_group`."""
    with contextlib.ExitStack() as files:
        out = files.enter_context(log.open("ab")) if log else subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out if log else None,
            start_new_session=True,
            env={**os.environ, **(variables or {})},
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the group: nothing after a clean end, unless the command forgot a process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM where all are dead
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def tail(log: Path) -> str:
    """The last lines of a log, for an error message."""
    if not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(lines[-12:])[-1500:]


# ---- in the process of one arm


def answer(task_file: Path, result_file: Path, do: Callable[[str], Result]) -> int:
    """Write what `do` makes of the task, or what it failed with, to `result_file`; the exit status."""
    try:
        result: Result = {"ok": True, **do(task_file.read_text())}
    except BaseException as error:
        traceback.print_exc()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    result_file.write_text(json.dumps(result))
    return 0 if result["ok"] else 1


def do_task(text: str) -> Result:
    """Measure the memory, write the weights, or measure an arm."""
    task = ArmTask.from_json(text)
    if task.arm == WEIGHTS:
        assert task.shape is not None
        write_checkpoint(task.shape, Path(task.model_path))
        return {}
    if task.arm == BANDWIDTH:
        _set_threads(task)
        bandwidth = measure_bandwidth(task.device, task.bandwidth_bytes)
        return {"bandwidth": bandwidth, "device": describe_device(task.device)}
    return measure_arm(task)


def _set_threads(task: ArmTask) -> None:
    import torch

    torch.set_num_threads(task.threads)


def measure_arm(task: ArmTask) -> Result:
    """All modes of one arm, after a warm-up."""
    arm, load = load_arm(task)
    import torch  # only now: load_arm times it

    workload = task.make_workload()
    arch = load_hf_config(Path(task.model_path))
    warm_up = warm_up_requests(workload.requests)
    arm.run(warm_up[:1])
    arm.run(warm_up)
    modes = {}
    for mode in task.modes:
        requests = workload.for_mode(mode)
        if mode != "warm":
            arm.forget()
        run = run_one_by_one(arm, requests) if one_by_one(mode) else arm.run(requests)
        groups = metrics.group_figures([request.group for request in requests], run.timings)
        modes[mode] = {**mode_result(run, mode, arch, DTYPE_BYTES[task.dtype]), "groups": groups}
        say(f"    {task.name} {mode}: {len(requests)} requests, {modes[mode]['output_tok_per_s']:.1f} tok/s")
    # Memory before the sweep, which may hold larger batches than the workload itself.
    gpu_bytes = torch.cuda.max_memory_allocated() if task.device == "cuda" else None
    memory = {"peak_rss_bytes": peak_memory_bytes(), "peak_gpu_bytes": gpu_bytes}
    sweep = [sweep_point(task, arm, workload.requests[:size]) for size in task.batch_sizes]
    return {**arm.info(), "load": load, "memory": memory, "modes": modes, "sweep": sweep}


def load_arm(task: ArmTask) -> tuple[Arm, dict[str, float]]:
    """The arm, ready, and the seconds that its imports and its construction took."""
    start = time.perf_counter()
    _set_threads(task)
    make: Callable[[ArmTask], Arm] = EngineArm
    if task.arm == BASELINE:
        from transformers import AutoModelForCausalLM  # noqa: F401

        from folovllm.benchmarks.hf_arm import HFArm as make
    else:
        import folovllm.entrypoints.llm  # noqa: F401
    imported = time.perf_counter()
    arm = make(task)
    return arm, {"import_seconds": imported - start, "load_seconds": time.perf_counter() - imported}


def warm_up_requests(requests: list[BenchRequest]) -> list[BenchRequest]:
    """A few short requests, to be sent one alone and then all together: they make buffers, thread pools and kernels.

    Their prompts are real ones read backwards, so that no prefix cache knows the beginning of a real one.
    """
    return [BenchRequest(request.prompt_token_ids[:16][::-1], output_len=4) for request in requests[:4]]


def run_one_by_one(arm: Arm, requests: list[BenchRequest]) -> Run:
    """Send each request when the one before is complete, and join what came back."""
    total, feed = Run(), Feed(requests)
    for index in range(len(requests)):
        run = arm.run([feed.complete(index)])
        feed.answered(index, run.tokens[0])
        total = total.then(run)
    return total


def mode_result(run: Run, mode: str, arch: ModelArchitecture, dtype_bytes: int) -> Result:
    """The figures of one mode, with the tokens for the comparison between arms."""
    kv_bytes = arch.kv_bytes_per_token(dtype_bytes)
    bandwidth = None  # a batch shares the weights between its requests: only a single stream has a simple floor
    if mode == "single":
        weights = metrics.weight_bytes_per_token(arch, dtype_bytes)
        bandwidth = metrics.decode_bytes_per_second(run.timings, weights, kv_bytes)
    return {
        **metrics.speed_figures(run.timings, run.seconds),
        **metrics.kv_figures(run.samples, kv_bytes),
        "preemptions": run.num_preemptions,
        "decode_bytes_per_second": bandwidth,
        "kv_series": metrics.kv_series(run.samples),
        "tokens": run.tokens,
    }


def sweep_point(task: ArmTask, arm: Arm, requests: list[BenchRequest]) -> Result:
    """Throughput of the first few requests of the workload sent at once."""
    arm.forget()
    run = arm.run(requests)
    figures = metrics.speed_figures(run.timings, run.seconds)
    say(f"    {task.name} {len(requests)} at once: {figures['output_tok_per_s']:.1f} tok/s")
    max_running = max(sample.num_running for sample in run.samples)
    kept = {name: figures[name] for name in ("seconds", "output_tok_per_s", "itl_ms")}
    return {"batch_size": len(requests), "max_running": max_running, "preemptions": run.num_preemptions, **kept}


if __name__ == "__main__":
    sys.exit(answer(Path(sys.argv[1]), Path(sys.argv[2]), do_task))
