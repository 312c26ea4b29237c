"""The process of one arm: load, warm up, measure each mode once, write JSON.

Milestone: M1. vLLM counterpart: none. A fresh process for each measurement keeps the arms apart: no memory, thread pool
or compiled kernel of one helps or hurts another, and peak memory is the arm's own.
"""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from folovllm.benchmarks import measure
from folovllm.benchmarks.engine_arm import Arm, EngineArm, Run
from folovllm.benchmarks.random_weights import write_checkpoint
from folovllm.benchmarks.requests import BenchRequest, Feed
from folovllm.benchmarks.task import BANDWIDTH, BASELINE, WEIGHTS, ArmTask
from folovllm.config import DTYPE_BYTES
from folovllm.hf_config import ModelArchitecture, load_hf_config

WARM_UP_REQUESTS, WARM_UP_PROMPT, WARM_UP_OUTPUT = 4, 16, 4


def child_main(task_file: Path, result_file: Path) -> int:
    """Do the task of `task_file`; whatever happens, `result_file` says so."""
    die_with_parent()
    task = ArmTask.from_json(task_file.read_text())
    result: dict[str, Any]
    try:
        result = {"ok": True} | do(task)
    except BaseException as error:
        traceback.print_exc()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    result_file.write_text(json.dumps(result))
    return 0 if result["ok"] else 1


def die_with_parent() -> None:
    """End this process and what it started once stdin closes: the parent holds the other end, even if it is killed."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if os.getpgrp() == os.getpid():  # started by the runner: this group is ours alone
        threading.Thread(target=watch, daemon=True).start()


def do(task: ArmTask) -> dict[str, Any]:
    """Measure the memory, write the weights, or measure an arm."""
    if task.arm == WEIGHTS:
        assert task.shape is not None
        write_checkpoint(task.shape, Path(task.model_path))
        return {}
    return probe(task) if task.arm == BANDWIDTH else measure_arm(task)


def probe(task: ArmTask) -> dict[str, Any]:
    """Memory bandwidth, and what torch knows of the device."""
    import torch

    from folovllm.benchmarks.probe import describe_device, measure_bandwidth

    torch.set_num_threads(task.threads)
    return {"bandwidth": measure_bandwidth(task.device, task.bandwidth_bytes), "device": describe_device(task.device)}


def measure_arm(task: ArmTask) -> dict[str, Any]:
    """All modes of one arm, after a warm-up."""
    arm, load = _load(task)
    workload = task.make_workload()
    arch = load_hf_config(Path(task.model_path))
    _warm_up(arm, workload.requests)
    modes = {}
    for mode in task.modes:
        requests = workload.for_mode(mode)
        if mode != "warm":
            arm.forget()
        run = run_one_by_one(arm, requests) if mode == "single" else arm.run(requests)
        groups = measure.group_figures([request.group for request in requests], run.timings)
        modes[mode] = {**mode_result(run, mode, arch, DTYPE_BYTES[task.dtype]), "groups": groups}
        _say(task, f"{mode}: {len(requests)} requests, {modes[mode]['output_tok_per_s']:.1f} tok/s")
    # Memory before the sweep, which may hold larger batches than the workload itself.
    memory = peak_memory(task.device)
    sweep = [_sweep_point(task, arm, workload.requests[:size]) for size in task.batch_sizes]
    return {**arm.info(), "load": load, "memory": memory, "modes": modes, "sweep": sweep}


def run_one_by_one(arm: Arm, requests: list[BenchRequest]) -> Run:
    """Send each request when the one before is complete, and join what came back."""
    total, feed = Run(), Feed(requests)
    for index in range(len(requests)):
        run = arm.run([feed.complete(index)])
        feed.answered(index, run.tokens[0])
        total = total.then(run)
    return total


def mode_result(run: Run, mode: str, arch: ModelArchitecture, dtype_bytes: int) -> dict[str, Any]:
    """The figures of one mode, with the tokens for the comparison between arms."""
    kv_bytes = arch.kv_bytes_per_token(dtype_bytes)
    bandwidth = None  # a batch shares the weights between its requests: only a single stream has a simple floor
    if mode == "single":
        weights = measure.weight_bytes_per_token(arch, dtype_bytes)
        bandwidth = measure.decode_bytes_per_second(run.timings, weights, kv_bytes)
    return {
        **measure.speed_figures(run.timings, run.seconds),
        **measure.kv_figures(run.samples, kv_bytes),
        "preemptions": run.num_preemptions,
        "decode_bytes_per_second": bandwidth,
        "kv_series": measure.kv_series(run.samples),
        "tokens": run.tokens,
    }


def peak_memory(device: str) -> dict[str, int | None]:
    """Most bytes this process ever held: resident, and on the GPU.

    Not getrusage where /proc is there: its maximum is inherited from the process that started this one.
    """
    gpu = None
    if device == "cuda":
        import torch

        gpu = torch.cuda.max_memory_allocated()
    return {"peak_rss_bytes": _peak_rss(), "peak_gpu_bytes": gpu}


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    high_water = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    if high_water is not None:
        return int(high_water[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _load(task: ArmTask) -> tuple[Arm, dict[str, float]]:
    """The arm, ready, and the seconds that its imports and its construction took."""
    start = time.perf_counter()
    import torch

    torch.set_num_threads(task.threads)
    make: Any = EngineArm
    if task.arm == BASELINE:
        from folovllm.benchmarks.hf_arm import HFArm as make
    else:
        import folovllm.entrypoints.llm  # noqa: F401
    imported = time.perf_counter()
    arm = make(task)
    return arm, {"import_seconds": imported - start, "load_seconds": time.perf_counter() - imported}


def _warm_up(arm: Arm, requests: list[BenchRequest]) -> None:
    """A few short requests, one alone and some together: buffers, thread pools and kernels are made here.

    Their prompts are read backwards, so that no prefix cache knows the beginning of a real one.
    """
    short = [
        BenchRequest(request.prompt_token_ids[:WARM_UP_PROMPT][::-1], WARM_UP_OUTPUT)
        for request in requests[:WARM_UP_REQUESTS]
    ]
    arm.run(short[:1])
    arm.run(short)


def _sweep_point(task: ArmTask, arm: Arm, requests: list[BenchRequest]) -> dict[str, Any]:
    """Throughput of the first few requests of the workload sent at once."""
    arm.forget()
    run = arm.run(requests)
    figures = measure.speed_figures(run.timings, run.seconds)
    _say(task, f"{len(requests)} at once: {figures['output_tok_per_s']:.1f} tok/s")
    return {
        "batch_size": len(requests),
        "max_running": max(sample.num_running for sample in run.samples),
        "preemptions": run.num_preemptions,
        "seconds": run.seconds,
        "output_tok_per_s": figures["output_tok_per_s"],
        "itl_ms": figures["itl_ms"],
    }


def _say(task: ArmTask, text: str) -> None:
    print(f"    {task.name} {text}", file=sys.stderr, flush=True)
