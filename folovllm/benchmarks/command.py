"""The benchmark from its command line to its files.

Milestone: M1. vLLM counterpart: vllm/entrypoints/cli/benchmark/main.py (`vllm bench`). No torch in this process, unless
it has to look for a GPU.
"""

import sys
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks import metrics, report
from folovllm.benchmarks.arms import BANDWIDTH, WEIGHTS, ArmTask
from folovllm.benchmarks.machine import command_line, machine_header, without_folders
from folovllm.benchmarks.options import BenchOptions, parse_options
from folovllm.benchmarks.random_model import check_room, checkpoint_folder, is_written
from folovllm.benchmarks.runner import run_rounds, run_task, say
from folovllm.benchmarks.workloads import WORKLOADS, make_workload
from folovllm.config import DTYPE_BYTES
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.hub import find_model
from folovllm.model_shapes import shape_architecture

SCRIPT = "scripts/compare_perf.py"
SCHEMA = "folovllm.compare_perf/1"
NOTES = (
    "Every arm runs in a fresh process per repeat, the arms in turn (every second round backwards), each after a "
    "warm-up of a few short requests; figures are medians over the repeats, a p99 is the median of the repeats' p99.",
    "Throughput counts output tokens; the time includes the prompts. Greedy, EOS ignored, no text is made of tokens.",
    "hf single: generate, one request after another. hf batch: one static batch, padded on the left, decoded until the "
    "longest output is complete; only the tokens asked for are counted. Its KV figures are calculated.",
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
        """The baseline comes before our arms: it is the reference of ratios and tokens."""
        baseline = [self.options.baseline] if self.options.baseline else []
        return [replace(self.task, arm=arm) for arm in [BANDWIDTH, *baseline, *self.options.arms]]

    @property
    def kv_bytes_per_token(self) -> int:
        return self.arch.kv_bytes_per_token(DTYPE_BYTES[self.options.dtype])

    @property
    def weight_bytes_per_token(self) -> int:
        return metrics.weight_bytes_per_token(self.arch, DTYPE_BYTES[self.options.dtype])

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
    options = parse_options(argv)
    return plot_again(options.plot_only) if options.plot_only else run(options, argv)


def plot_again(file: Path) -> int:
    """Draw the pictures of a result file of this script beside it; the exit status."""
    from folovllm.benchmarks.plot import write_plots

    try:
        result = report.read_json(file, SCHEMA)
    except (ValueError, OSError) as error:
        print(f"compare_perf.py: error: {error}", file=sys.stderr)
        return 2
    for path in write_plots(report.name_arms(result), file.parent, file.stem):
        print(f"wrote {path}")
    return 0


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
    files = write_files(result, options.output)
    report.print_tables(result, files)
    return 0 if result["ok"] else 1


def write_files(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the JSON and the plots to `folder`; returns their paths."""
    from folovllm.benchmarks.plot import write_plots  # matplotlib takes a while: not before the arms have run

    now, described = datetime.now(), result["run"]
    result["date"] = now.isoformat(timespec="seconds")
    stem = f"compare_perf_{described['workload']['name']}_{described['device']}_{now:%Y%m%d-%H%M%S}"
    json_file = report.write_json(result, folder / f"{stem}.json")
    return [json_file, *write_plots(report.name_arms(result), folder, stem)]


def make_plan(options: BenchOptions) -> Plan:
    """Find the model and check that the workload suits it. Raises ValueError that says what to change."""
    device = options.device
    if device != "cpu":
        from folovllm.platforms import choose_device

        device = choose_device(device)
    if options.random_weights is None:
        folder = find_model(options.model, pull=True)
        arch = load_hf_config(folder)
    else:
        folder, arch = checkpoint_folder(options.random_weights), shape_architecture(options.random_weights)
        check_room(options.random_weights, folder, device, options.dtype)
    workload = make_workload(options.workload, arch.vocab_size, options.num_requests, options.hit_rates)
    if not workload.longest <= options.max_model_len <= arch.max_context_len:
        raise ValueError(
            f"--max-model-len {options.max_model_len}: the longest request has {workload.longest} tokens and the model "
            f"{arch.max_context_len} positions; choose a length between them"
        )
    shared = {field.name: getattr(options, field.name) for field in fields(ArmTask) if hasattr(options, field.name)}
    found = {"model_path": str(folder), "vocab_size": arch.vocab_size, "modes": workload.modes, "device": device}
    return Plan(options, ArmTask(arm="", shape=options.random_weights, **shared | found), arch)


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
    arms = {name: metrics.summarise_arm(arm_runs) for name, arm_runs in runs.items()}
    bandwidth = metrics.median_of([r["bandwidth"] for r in probe.results]) if probe.results else None
    reference = metrics.add_ratios(arms, bandwidth["bytes_per_second"] if bandwidth else None)
    equality = metrics.equality_rows(runs, must_be_equal=options.dtype == "float32")
    fit = {task.arm: run_fit(task, options.timeout) for task in plan.fit_tasks}
    repeats_agree = all(figures["repeats_equal"] for arm in arms.values() for figures in arm.get("modes", {}).values())
    failed = [run for run in [probe, *runs.values()] if run.error] + [run for run in fit.values() if not run["ok"]]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "ok": not failed and all(row["ok"] for row in equality) and repeats_agree,
        "machine": machine | (probe.results[0]["device"] if probe.results else {}),
        "run": describe_run(plan, SCRIPT, argv),
        "bandwidth": bandwidth or {"error": probe.error},
        "reference": reference,
        "arms": arms,
        "equality": equality,
        "fit": fit,
        "ablation": metrics.ablation_rows(arms, options.arms) if options.ablate else [],
        "notes": list(NOTES),
    }
    if rows := report.page_rows(result):
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


def describe_run(plan: Plan, script: str, argv: list[str]) -> dict[str, Any]:
    """What was run, so that it can be run again."""
    options, task, workload = plan.options, plan.task, plan.task.make_workload()
    return {
        "command": command_line(script, argv),
        "model": without_folders(options.model_name),
        "random_weights": options.random_weights,
        "device": task.device,
        **{
            name: getattr(options, name) for name in ("dtype", "threads", "repeats", "max_model_len", "kv_cache_memory")
        },
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "workload": {
            "name": workload.name,
            "about": WORKLOADS[workload.name].about,
            "num_requests": {mode: len(workload.for_mode(mode)) for mode in task.modes},
            "prompt_tokens": sum(workload.prompt_lens),
            "output_tokens": sum(request.output_len for request in workload.requests),
            "sha256": workload.digest(),
        },
    }
