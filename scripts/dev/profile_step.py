#!/usr/bin/env python3
"""Where one decode step's time goes, before and after each change of M4, with the gain that arithmetic predicted.

Milestone: M4. vLLM counterpart: its torch profiler hooks, which show one state of the engine.
A ladder of arms, each with one change more (profile_step_arm.py). Every arm runs in a fresh process per round, the
arms in turn, and reads the memory's speed beside its own: what a rented machine's memory gives changes from minute to
minute. Milliseconds come from undisturbed steps; a few more steps of the same process run under torch.profiler and say
which operators they were. Predictions are arithmetic on what the same run measured (profile_step_predictions.py); the
wrong ones stay in the table.

    python scripts/dev/profile_step.py [--arms 1,2,...] [--batches 1,32] [--steps 40] [--json OUT] [--plot OUT]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from profile_step_arm import HUGE, PROFILED, RUNGS, Figures, Job, do_job
from profile_step_predictions import PREDICTIONS, Sizes
from rich.console import Console

from folovllm.benchmarks.command import Plan, ensure_weights, make_plan
from folovllm.benchmarks.machine import command_line, machine_header, without_folders
from folovllm.benchmarks.metrics import median_of
from folovllm.benchmarks.options import BenchOptions, numbers, parse_options, positive
from folovllm.benchmarks.report import make_table, num, write_json
from folovllm.benchmarks.runner import answer, ask, say
from folovllm.config import DTYPE_BYTES


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, BenchOptions]:
    """Our own options; all others are the benchmark's."""
    parser = argparse.ArgumentParser(
        prog="profile_step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Others, as in scripts/compare_perf.py: --model, --random-weights SHAPE, --threads (2), --repeats (3).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--arms", type=numbers, default=tuple(rung.number for rung in RUNGS), metavar="1,2,...", help="default: all")
    add("--batches", type=numbers, default=(1, 32), metavar="1,32", help="requests that decode together")
    add("--context", type=positive, default=200, help="tokens of each request, on average (default: %(default)s)")
    add("--steps", type=positive, default=40, help="timed decode steps per process (default: %(default)s)")
    add("--json", type=Path, metavar="OUT")
    add("--plot", type=Path, metavar="OUT")
    args, benchmark_args = parser.parse_known_args(argv)
    if not set(args.arms) <= {rung.number for rung in RUNGS} or sorted(set(args.arms)) != list(args.arms):
        parser.error(f"--arms: of 1 to {len(RUNGS)}, each once, in order")
    options = parse_options(["--threads", "2", "--device", "cpu", *benchmark_args])
    if options.device != "cpu":
        parser.error("--device: this profile is the CPU's")
    return args, options


def run_rounds(jobs: list[Job], repeats: int, timeout: float) -> dict[int, list[dict[str, Any]]]:
    """Number of the arm -> what its processes answered; every second round backwards, a failed arm only once."""
    answers: dict[int, list[dict[str, Any]]] = {job.number: [] for job in jobs}
    for index in range(repeats):
        for job in jobs if index % 2 == 0 else reversed(jobs):
            if all(answer["ok"] for answer in answers[job.number]):
                say(f"[round {index + 1}/{repeats}] {job.number} {RUNGS[job.number - 1].change} ...")
                answers[job.number].append(run_job(job, timeout))
    return answers


def run_job(job: Job, timeout: float) -> dict[str, Any]:
    """One arm in a fresh process."""
    return ask([sys.executable, __file__, "--child"], job.to_json(), timeout)


def sizes_of(plan: Plan, context: int) -> Sizes:
    weights = plan.weight_bytes_per_token
    num_weights = weights // DTYPE_BYTES[plan.options.dtype]
    return Sizes(weights, num_weights, plan.kv_bytes_per_token, plan.arch.vocab_size, context)


def rows_of(arms: dict[int, dict[str, Figures]], sizes: Sizes) -> list[dict[str, Any]]:
    """Microseconds, one row per batch size and arm; a prediction only where the arm before was measured too."""
    batches = next(iter(arms.values()), {})
    return [make_row(arms, number, batch, sizes) for batch in batches for number in arms]


def make_row(arms: dict[int, dict[str, Figures]], number: int, batch: str, sizes: Sizes) -> dict[str, Any]:
    now, before = arms[number][batch], arms.get(number - 1, {}).get(batch)
    pages = "huge" if number >= HUGE else "ordinary"
    predicted = PREDICTIONS[number][0](before, now, sizes, int(batch)) if before else None
    times = {name: now[f"{name}_ms"] * 1e3 for name in ("execute", "sample", "rest", "step")}
    return {
        "arm": f"{number} {RUNGS[number - 1].change}",
        "requests": int(batch),
        **times,
        "predicted_step": "-" if predicted is None else predicted * 1e3,
        "predicted_gain": f"{before['step_ms'] / predicted:.2f}x" if before and predicted else "-",
        "measured_gain": f"{before['step_ms'] / now['step_ms']:.2f}x" if before else "-",
        "read_GB/s": f"{sizes.step_bytes(int(batch)) / now['step_ms'] / 1e6:.1f}",
        "memory_GB/s": f"{now['bandwidth'][pages] / 1e9:.1f}",
        **{part: ms * 1e3 for part, ms in parts_of(now).items()},
    }


def parts_of(figures: Figures) -> dict[str, float]:
    """Milliseconds: the step cut by what ran, in the order of the bars."""
    ms = {name: family["ms"] for name, family in figures["families"].items()}
    small = ms["norm"] + ms["rotary"] + ms["silu"]
    return {
        "linear": ms["linear"],
        "attention": ms["attention"],
        "whole_layers": ms["layer"],
        "KV_write": ms["kv_write"],
        "norm,_rotary,_SiLU": small,
        "sampler": ms["sampler"],
        "other_operators": ms["other"],
        "Python": figures["python_ms"],
    }


def print_tables(result: dict[str, Any]) -> None:
    """Two per batch size: times and gains, and what the time went to."""
    console, parts = Console(width=max(Console().width, 150)), result["parts"]
    for batch in dict.fromkeys(row["requests"] for row in result["results"]):
        rows = [row for row in result["results"] if row["requests"] == batch]
        title = f"One decode step of {batch}, {result['run']['context']} tokens each: ms"
        names = [name for name in rows[0] if name not in ("requests", *parts)]
        for columns in (names, ["arm", *parts]):
            cells = [{name.replace("_", " "): in_ms(row[name]) for name in columns} for row in rows]
            console.print(make_table(title, cells))
    for number, how in result["predictions"].items():
        console.print(f"predicted {number}: {how}", highlight=False)
    for number, error in result["failed"].items():
        console.print(f"arm {number} FAILED: {error}", highlight=False)


def in_ms(value: Any) -> str:
    """Microseconds as milliseconds; text as it is."""
    return num(value, 2, 1e3) if isinstance(value, float) else value


def draw(result: dict[str, Any], path: Path) -> None:
    """A stacked bar per arm, a panel per batch size; the black mark is what was predicted."""
    from folovllm.benchmarks.plot import plt, save

    rows = result["results"]
    batches = list(dict.fromkeys(row["requests"] for row in rows))
    figure, axes = plt.subplots(1, len(batches), figsize=(8 * len(batches), 5.5), layout="constrained", squeeze=False)
    machine, run = result["machine"], result["run"]
    figure.suptitle(f"Where a decode step's time goes: {run['model']}, {run['dtype']}, {run['context']} tokens each, "
                    f"{machine['cpu']}, {run['threads']} threads", fontsize=10)  # fmt: skip
    for ax, batch in zip(axes[0], batches, strict=True):
        bars = [row for row in rows if row["requests"] == batch]
        labels, lefts = [row["arm"] for row in bars], [0.0] * len(bars)
        for part in result["parts"]:
            widths = [row[part] / 1e3 for row in bars]
            ax.barh(labels, widths, left=lefts, label=part.replace("_", " "))
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        marks = [(row["predicted_step"] / 1e3, row["arm"]) for row in bars if row["predicted_step"] != "-"]
        if marks:
            ax.plot(*zip(*marks, strict=True), "k|", markersize=20, label="predicted")
        ax.invert_yaxis()
        ax.set(title=f"{batch} request{'s' if batch > 1 else ''}", xlabel="ms per step")
    axes[0][-1].legend(fontsize=8)
    save(figure, path)


def run(args: argparse.Namespace, options: BenchOptions, argv: list[str]) -> int:
    machine = machine_header()  # first: the load average should not be ours
    plan = make_plan(options)
    ensure_weights(plan)
    jobs = [Job(number, plan.task, args.batches, args.context, args.steps) for number in args.arms]
    answers = run_rounds(jobs, options.repeats, options.timeout)
    failed = {number: a["error"] for number, given in answers.items() for a in given if not a["ok"]}
    arms = {n: median_of([a["batches"] for a in given]) for n, given in answers.items() if n not in failed}
    result = {
        "schema": "folovllm.profile_step/1",
        "command": command_line("scripts/dev/profile_step.py", argv),
        "unit": "microseconds",
        "machine": machine,
        "run": {
            "model": without_folders(options.model_name),
            "dtype": options.dtype,
            "threads": options.threads,
            "repeats": options.repeats,
            "context": args.context,
            "steps": args.steps,
            "profiled_steps": PROFILED,
        },
        "predictions": {n: PREDICTIONS[n][1] for n in arms if n in PREDICTIONS},
        "parts": list(parts_of(next(iter(next(iter(arms.values())).values())))) if arms else [],
        "results": rows_of(arms, sizes_of(plan, args.context)),
        "failed": failed,
        "arms": arms,
        "rounds": answers,
    }
    print_tables(result)
    if args.json:
        write_json(result, args.json)
    if args.plot and arms:
        draw(result, args.plot)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--child"]:  # hidden: this process is one arm
        return answer(Path(argv[1]), Path(argv[2]), do_job)
    args, options = parse_args(argv)
    try:
        return run(args, options, argv)
    except (ValueError, OSError) as error:
        print(f"profile_step.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
