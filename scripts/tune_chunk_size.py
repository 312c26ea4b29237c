#!/usr/bin/env python3
"""Which token budget? Sweeps `max_num_batched_tokens` while 8 requests decode and 4,000-token prompts arrive.

Milestone: M5. vLLM counterpart: benchmarks/auto_tune. The budget is how many tokens one step computes: decoding
requests take one each, the rest of it goes to the prompt. A small one keeps the steps short, so no decoding request
waits long; a large one has the prompt done in fewer steps, and wastes less. The choice starts from a promise to
the users, an SLO (service level objective): of the budgets that keep it, the one that answers long prompts soonest is
picked.

The SLO is on the 99th percentile of the time between tokens (ITL) of the decoding requests: in milliseconds, or in
multiples of their undisturbed ITL, which is measured in the same run without any long prompt. Each budget runs in fresh
processes, the budgets in turn; medians count.

    python scripts/tune_chunk_size.py [--budgets 64,128,256,512,1024,2048] [--slo-itl-ms 100 | --slo-itl-times 8]
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.arms import BANDWIDTH, ArmTask
from folovllm.benchmarks.command import Plan, describe_run, ensure_weights, make_plan
from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.metrics import ArmRuns, summarise_arm
from folovllm.benchmarks.options import BenchOptions, numbers, parse_options
from folovllm.benchmarks.report import headline, read_json, write_json
from folovllm.benchmarks.runner import run_rounds
from folovllm.benchmarks.workloads import DECODING, LONG, NUM_DECODING

SCHEMA = "folovllm.tune_chunk_size/1"
WORKLOAD = "long-prompts"
UNDISTURBED = "undisturbed"  # the decoding requests alone
BUDGETS = (32, 64, 128, 256, 512, 1024, 2048)
SLO_TIMES = 8.0  # how much longer than undisturbed a token may take, unless --slo says otherwise


@dataclass(frozen=True)
class Point:
    """What one budget gives; milliseconds and tokens per second, medians over the repeats."""

    budget: int
    itl_p50_ms: float
    itl_p99_ms: float
    ttft_long_ms: float
    total_tok_per_s: float


def pick(points: list[Point], slo_ms: float) -> Point | None:
    """Among the budgets whose ITL p99 keeps the SLO, the one with the lowest TTFT of the long prompts."""
    kept = [point for point in points if point.itl_p99_ms <= slo_ms]
    return min(kept, key=lambda point: point.ttft_long_ms, default=None)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, BenchOptions]:
    """Our own options; all others are the benchmark's."""
    parser = argparse.ArgumentParser(
        prog="tune_chunk_size.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of scripts/compare_perf.py: --model, --random-weights, --repeats, ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--budgets", type=numbers, default=BUDGETS, metavar="64,128,...", help="default: %(default)s")
    slo = parser.add_mutually_exclusive_group()
    slo.add_argument("--slo-itl-ms", type=float, metavar="MS", help="ITL p99 of the decoding requests, at most")
    slo.add_argument(
        "--slo-itl-times", type=float, default=SLO_TIMES, metavar="X",
        help="the same, as a multiple of the undisturbed median ITL (default: %(default)s)",
    )  # fmt: skip
    add("--json", type=Path, metavar="OUT", help="default: tune_chunk_size_DEVICE_DATE.json in --output")
    add("--plot", type=Path, metavar="OUT", help="default: the same with .png")
    args, benchmark_args = parser.parse_known_args(argv)
    if len(set(args.budgets)) != len(args.budgets) or min(args.budgets) <= NUM_DECODING:
        parser.error(f"--budgets: each once, and more than {NUM_DECODING}, which the decoding requests take")
    return args, parse_options([*benchmark_args, "--workload", WORKLOAD])


def make_tasks(plan: Plan, budgets: tuple[int, ...]) -> list[ArmTask]:
    """One per budget, and the decoding requests alone."""
    top = plan.options.arms[-1]
    alone = replace(plan.task, arm=top, label=UNDISTURBED, num_requests=NUM_DECODING)
    return [
        replace(plan.task, arm=BANDWIDTH),
        alone,
        *(replace(plan.task, arm=f"{top}+budget={budget}") for budget in sorted(budgets)),
    ]


def points_of(arms: dict[str, dict[str, Any]]) -> list[Point]:
    """From the summaries of the arms; one that failed is left out."""
    points = []
    for name, arm in arms.items():
        if name != UNDISTURBED and "modes" in arm:
            figures = arm["modes"]["batch"]
            decoding, long = figures["groups"][DECODING], figures["groups"][LONG]
            itl, ttft = decoding["itl_ms"], long["ttft_ms"]["p50"]
            points.append(Point(int(name.split("=")[1]), itl["p50"], itl["p99"], ttft, figures["total_tok_per_s"]))
    return points


def summarise(runs: dict[str, ArmRuns], args: argparse.Namespace) -> dict[str, Any]:
    """Points, the SLO in milliseconds, and who keeps it."""
    arms = {name: summarise_arm(arm_runs) for name, arm_runs in runs.items()}
    if "modes" not in arms[UNDISTURBED]:
        raise ValueError(f"the decoding requests alone failed: {arms[UNDISTURBED]['error']}")
    itl = arms[UNDISTURBED]["modes"]["batch"]["groups"][DECODING]["itl_ms"]
    slo = args.slo_itl_ms if args.slo_itl_ms is not None else args.slo_itl_times * itl["p50"]
    points = points_of(arms)
    picked = pick(points, slo)
    return {
        "undisturbed_itl_ms": itl,
        "slo_itl_ms": slo,
        "slo_times_undisturbed": slo / itl["p50"],
        "picked_budget": picked.budget if picked else None,
        "results": [asdict(point) for point in points],
        "failed": {name: arm["error"] for name, arm in arms.items() if not arm["ok"]},
    }


def verdict(result: dict[str, Any]) -> str:
    slo = f"ITL p99 of at most {result['slo_itl_ms']:.1f} ms ({result['slo_times_undisturbed']:.1f} x undisturbed)"
    if result["picked_budget"] is None:
        best = min(result["results"], key=lambda point: point["itl_p99_ms"], default=None)
        hint = f"; the lowest is {best['itl_p99_ms']:.1f} ms at {best['budget']}" if best else ""
        return f"no budget keeps an {slo}{hint}"
    return f"an {slo} picks max_num_batched_tokens={result['picked_budget']}"


def print_table(result: dict[str, Any]) -> None:
    undisturbed = result["undisturbed_itl_ms"]
    print(f"{'budget':>8} {'ITL p50 ms':>11} {'ITL p99 ms':>11} {'TTFT long ms':>13} {'total tok/s':>12}")
    print(f"{'alone':>8} {undisturbed['p50']:11.1f} {undisturbed['p99']:11.1f} {'':>13} {'':>12}")
    for p in result["results"]:
        mark = " <" if p["budget"] == result["picked_budget"] else ""
        print(
            f"{p['budget']:8} {p['itl_p50_ms']:11.1f} {p['itl_p99_ms']:11.1f} {p['ttft_long_ms']:13.0f} "
            f"{p['total_tok_per_s']:12.0f}{mark}"
        )
    print(verdict(result))


def draw(result: dict[str, Any], path: Path) -> None:
    """Three curves over the budget; the SLO as a line, the picked budget marked in all."""
    from folovllm.benchmarks.plot import WIDTH, plt, save

    budgets = [p["budget"] for p in result["results"]]
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.8), layout="constrained")
    figure.suptitle(f"{headline(result)}\n{verdict(result)}", fontsize=9)
    panels = (
        ("itl_p99_ms", "ITL p99, decoding requests", "ms (log)", "#d62728"),
        ("ttft_long_ms", "TTFT of 4,000-token prompts", "ms", "#1f77b4"),
        ("total_tok_per_s", "Throughput with prompts", "tokens / s", "#2ca02c"),
    )
    for ax, (key, title, unit, colour) in zip(axes, panels, strict=True):
        ax.plot(budgets, [p[key] for p in result["results"]], marker="o", color=colour)
        ax.set_title(title, fontsize=10)
        ax.set(ylabel=unit, xlabel="max_num_batched_tokens", xscale="log")
        ax.set_xticks(budgets, [str(budget) for budget in budgets], fontsize=8, rotation=45)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        if result["picked_budget"]:
            ax.axvline(result["picked_budget"], color="black", linestyle=":", label="picked")
        if key == "itl_p99_ms":
            ax.set_yscale("log")
            ax.axhline(result["slo_itl_ms"], color="grey", linestyle="--", label="SLO")
            ax.axhline(result["undisturbed_itl_ms"]["p50"], color="grey", label="undisturbed median")
            ax.legend(fontsize=8, loc="upper left")
            ax.set_ylim(top=4 * max(p[key] for p in result["results"]))
        else:
            ax.set_ylim(0, 1.1 * max(p[key] for p in result["results"]))
    save(figure, path)


def run(args: argparse.Namespace, options: BenchOptions, argv: list[str]) -> int:
    machine, now = machine_header(), datetime.now()
    plan = make_plan(options)
    ensure_weights(plan)
    runs = run_rounds(make_tasks(plan, args.budgets), options.repeats, options.timeout)
    probe = runs.pop(BANDWIDTH).results
    described = describe_run(plan, "scripts/tune_chunk_size.py", argv)
    result = {
        "schema": SCHEMA,
        "date": now.isoformat(timespec="seconds"),
        "command": described["command"],
        "unit": "ms",
        "machine": machine | (probe[0]["device"] if probe else {}),
        "run": described,
        **summarise(runs, args),
    }
    stem = options.output / f"tune_chunk_size_{plan.task.device}_{now:%Y%m%d-%H%M%S}"
    json_file, plot_file = args.json or stem.with_suffix(".json"), args.plot or stem.with_suffix(".png")
    write_json(result, json_file)
    draw(result, plot_file)
    print_table(result)
    print(f"wrote {json_file}\nwrote {plot_file}")
    return 1 if result["failed"] else 0


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, options = parse_args(argv)
    try:
        if options.plot_only:
            plot_file = args.plot or options.plot_only.with_suffix(".png")
            draw(read_json(options.plot_only, SCHEMA), plot_file)
            print(f"wrote {plot_file}")
            return 0
        return run(args, options, argv)
    except (ValueError, OSError) as error:
        print(f"tune_chunk_size.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
