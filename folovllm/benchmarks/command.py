"""The benchmark from its command line to its files.

Milestone: M1. vLLM counterpart: `vllm bench`. No torch in this process, unless it has to look for a GPU.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks import report, summary
from folovllm.benchmarks.ablation import ablation_rows
from folovllm.benchmarks.groups import page_rows
from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.options import BenchOptions, parse_options
from folovllm.benchmarks.random_weights import check_room, checkpoint_folder, is_written
from folovllm.benchmarks.runner import children_end_with_us, run_rounds, run_task, say
from folovllm.benchmarks.shapes import shape_architecture
from folovllm.benchmarks.task import BANDWIDTH, WEIGHTS, ArmTask
from folovllm.benchmarks.workloads import WORKLOADS, make_workload
from folovllm.config import DTYPE_BYTES
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.hub import find_model

SCHEMA = "folovllm.compare_perf/1"
NOTES = (
    "Every arm runs in a fresh process per repeat, the arms in turn (every second round backwards), each after a "
    "warm-up of a few short requests; figures are medians over the repeats, a p99 is the median of the repeats' p99.",
    "Throughput counts output tokens; the time includes the prompts. Greedy, EOS ignored, no text is made of tokens.",
    "hf single: generate, one request after another. hf batch: one static batch, padded on the left, decoded until the "
    "longest output is complete; tokens nobody asked for are not counted. Its KV figures are calculated.",
    "The prefix cache is emptied before every mode but warm, which repeats cold. long-prompts: requests arrive between "
    "two steps, when the decoding ones have got so many tokens each; TTFT counts from there.",
    "KV utilisation: slots that hold K/V over slots in reserved blocks, mean over the steps.",
    "GB/s: weights and K/V that single-stream decode steps must read (unquantised), over the time between tokens; its "
    "share is of the memory bandwidth measured in this run.",
)


@dataclass(frozen=True)
class Plan:
    """The options, with the model looked at: the task that every arm shares."""

    options: BenchOptions
    task: ArmTask
    arch: ModelArchitecture

    @property
    def tasks(self) -> list[ArmTask]:
        return [replace(self.task, arm=arm) for arm in [BANDWIDTH, *self.options.all_arms]]

    @property
    def kv_bytes_per_token(self) -> int:
        return self.arch.kv_bytes_per_token(DTYPE_BYTES[self.options.dtype])

    @property
    def fit_tasks(self) -> list[ArmTask]:
        """Our arms on the batch alone, in a cache of a few full-length pages (and the null page)."""
        if self.options.fit_pages is None:
            return []
        kv_bytes = (self.options.fit_pages + 1) * self.options.max_model_len * self.kv_bytes_per_token
        task = replace(self.task, modes=("batch",), batch_sizes=(), kv_cache_memory=kv_bytes)
        return [replace(task, arm=arm) for arm in self.options.arms]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if all went well, 1 if an arm failed or float32 tokens differ, 2 for a wrong command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--arm"]:  # hidden: this process is one arm of another one's benchmark
        from folovllm.benchmarks.child import child_main

        return child_main(Path(argv[1]), Path(argv[2]))
    options = parse_options(argv)
    with children_end_with_us():
        return run(options, argv)


def run(options: BenchOptions, argv: list[str]) -> int:
    """Plan, measure, write, print; the exit status."""
    try:
        plan = make_plan(options)
        options.output.mkdir(parents=True, exist_ok=True)
        ensure_weights(plan)
    except (ValueError, OSError) as error:
        print(f"compare_perf.py: error: {error}", file=sys.stderr)
        return 2
    result = measure(plan, argv)
    files = report.write_files(result, options.output, datetime.now())
    report.print_tables(result, files)
    return 0 if result["ok"] else 1


def make_plan(options: BenchOptions) -> Plan:
    """Find the model and check that the workload suits it. ValueError says what to change."""
    device = options.device
    if device != "cpu":
        from folovllm.platforms import choose_device

        device = choose_device(device)
    folder, arch = model_of(options, device)
    workload = make_workload(options.workload, arch.vocab_size, options.num_requests, options.hit_rates)
    if options.max_model_len > arch.max_position_embeddings:
        raise ValueError(
            f"--max-model-len {options.max_model_len}: the model has {arch.max_position_embeddings} positions"
        )
    if workload.longest > options.max_model_len:
        raise ValueError(
            f"--max-model-len {options.max_model_len} is too short: the longest request has {workload.longest} tokens"
        )
    task = ArmTask(
        arm="",
        model_path=str(folder),
        vocab_size=arch.vocab_size,
        workload=options.workload,
        num_requests=options.num_requests,
        modes=workload.modes,
        device=device,
        dtype=options.dtype,
        threads=options.threads,
        max_model_len=options.max_model_len,
        kv_cache_memory=options.kv_cache_memory,
        batch_sizes=options.batch_sizes,
        bandwidth_bytes=options.bandwidth_bytes,
        hit_rates=options.hit_rates,
        shape=options.random_weights,
    )
    return Plan(options, task, arch)


def model_of(options: BenchOptions, device: str) -> tuple[Path, ModelArchitecture]:
    """The folder of the weights, real or (not written yet, perhaps) random, and what config.json says."""
    if options.random_weights is None:
        folder = find_model(options.model, pull=True)
        return folder, load_hf_config(folder)
    folder = checkpoint_folder(options.random_weights)
    check_room(options.random_weights, folder, device, options.dtype)
    return folder, shape_architecture(options.random_weights)


def ensure_weights(plan: Plan) -> None:
    """Write the random checkpoint if it is not there, in a process of its own: this one has no torch."""
    folder = Path(plan.task.model_path)
    if plan.task.shape is None or is_written(folder):
        return
    say(f"writing random weights of {plan.task.shape}, once, to the cache ...")
    result = run_task(replace(plan.task, arm=WEIGHTS), plan.options.timeout)
    if not result["ok"]:
        raise ValueError(f"the random weights could not be written: {result['error']}")


def measure(plan: Plan, argv: list[str]) -> dict[str, Any]:
    """Run everything and put the result together, in the shape of the JSON file."""
    options = plan.options
    machine = machine_header()  # first: the load average should not be ours
    runs = run_rounds(plan.tasks, options.repeats, options.timeout)
    probe = runs.pop(BANDWIDTH)
    arms = {name: summary.summarise_arm(arm_runs) for name, arm_runs in runs.items()}
    bandwidth = summary.median_of([r["bandwidth"] for r in probe.results]) if probe.results else None
    reference = summary.add_ratios(arms, bandwidth["bytes_per_second"] if bandwidth else None)
    equality = summary.equality_rows(runs, must_be_equal=options.dtype == "float32")
    fit = {task.arm: run_fit(task, options.timeout) for task in plan.fit_tasks}
    ablation = ablation_rows(arms, options.arms) if options.ablate else []
    failed = [run for run in [probe, *runs.values()] if run.error] + [run for run in fit.values() if not run["ok"]]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "ok": not failed and all(row["ok"] for row in equality) and all(map(_repeats_agree, arms.values())),
        "machine": machine | (probe.results[0]["device"] if probe.results else {}),
        "run": describe_run(plan, argv),
        "bandwidth": bandwidth or {"error": probe.error},
        "reference": reference,
        "arms": arms,
        "equality": equality,
        "fit": fit,
        "ablation": ablation,
        "notes": list(NOTES),
    }
    if rows := page_rows(result):
        result |= {"command": result["run"]["command"], "unit": "ms", "results": rows}
    return result


def run_fit(task: ArmTask, timeout: float) -> dict[str, Any]:
    """How many requests ran at once in little KV memory. Counters, so once is enough."""
    say(f"[fit] {task.arm} in {task.kv_cache_memory / 2**20:.1f} MiB ...")
    result = run_task(task, timeout)
    if not result["ok"]:
        say(f"    {task.arm} FAILED: {result['error']}")
        return {"ok": False, "error": result["error"]}
    figures = result["modes"]["batch"]
    wanted = ("max_running", "mean_running", "preemptions", "kv_utilisation", "output_tok_per_s")
    return {"ok": True, "kv_cache": result["kv_cache"], **{name: figures[name] for name in wanted}}


def describe_run(plan: Plan, argv: list[str]) -> dict[str, Any]:
    """What was run, so that it can be run again."""
    options, workload = plan.options, plan.task.make_workload()
    return {
        "command": shlex.join(["scripts/compare_perf.py", *map(without_folders, argv)]),
        "model": without_folders(options.model_name),
        "random_weights": options.random_weights,
        "device": plan.task.device,
        "dtype": options.dtype,
        "threads": options.threads,
        "repeats": options.repeats,
        "max_model_len": options.max_model_len,
        "kv_cache_memory": options.kv_cache_memory,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "workload": {
            "name": workload.name,
            "about": WORKLOADS[workload.name].about,
            "num_requests": {mode: len(workload.for_mode(mode)) for mode in workload.modes},
            "prompt_tokens": sum(workload.prompt_lens),
            "output_tokens": sum(request.output_len for request in workload.requests),
            "sha256": workload.digest(),
        },
    }


def without_folders(text: str) -> str:
    """An absolute path without the folders before its name: results are published, the layout of a disk is not."""
    return Path(text).name if Path(text).is_absolute() else text


def _repeats_agree(arm: dict[str, Any]) -> bool:
    return all(figures["repeats_equal"] for figures in arm.get("modes", {}).values())
