"""`folovllm learn m3 bench`: what milestones/m3/bench.toml compares, as a table, and whether its claims hold.

Milestone: M2. vLLM counterpart: none. The work is done in folovllm/sim, without torch.
"""

import textwrap
from collections.abc import Mapping
from typing import Any

import typer

from folovllm.entrypoints.commands.learn_progress import pages_base
from folovllm.learn.exercise import milestones_dir
from folovllm.milestones import Rung
from folovllm.sim.bench import Bench, load_bench, run_bench
from folovllm.sim.claims import Arms, holds, values_of
from folovllm.sim.counting import METRICS

WIDTH = 110
GIGABYTES = ("weight_bytes", "bytes_read")


def show_bench(rung: Rung) -> bool:
    """Runs the bench of a milestone and prints it. Returns whether all claims hold."""
    bench = load_bench(milestones_dir() / rung.id / "bench.toml")
    typer.secho(f"{rung.id}: {bench.title}", bold=True)
    for line in _about(bench):
        typer.echo(line)
    arms = run_bench(bench)
    typer.echo("arms:")
    for name, arm in bench.arms.items():
        typer.echo(f"  {name}: {_arguments(arm)}")
    typer.echo(f"\n{table(bench, arms)}\n")
    results = [holds(claim, arms) for claim in bench.claims]
    width = max(map(len, bench.claims))
    for claim, result in zip(bench.claims, results, strict=True):
        values = ", ".join(_short(value) for value in values_of(claim, arms))
        typer.secho(f" {'holds' if result else 'FAILS'}  {claim:{width}}  {values}", fg=None if result else "red")
    typer.echo("\nThe times are those of the simulator, and nothing is claimed about them. How it models them:")
    typer.echo(f"  {pages_base()}docs/learn/simulator.md")
    typer.echo("The real engine is measured in a clone of the repository by:")
    for command in bench.measure:
        typer.echo(f"  {command}")
    return all(results)


def _about(bench: Bench) -> list[str]:
    """What is run, and the ledger, a paragraph each."""
    common = "".join(f", {name}={value!r}" for name, value in bench.engine.items())
    workload = f"{bench.workload['num_requests']} requests, {bench.workload['about']}{common}"
    return [
        textwrap.fill(text, WIDTH, initial_indent=f"{name + ':':12}", subsequent_indent=" " * 12)
        for name, text in {**bench.ledger, "workload": workload}.items()
    ]


def _arguments(arm: Mapping[str, Any]) -> str:
    """E.g. "preset='m6', kv_tokens=800": the engine arguments of an arm, and what it changes in the workload."""
    merged = {name: value for name, value in arm.items() if name != "workload"} | dict(arm.get("workload", {}))
    return ", ".join(f"{name}={value!r}" for name, value in merged.items())


def table(bench: Bench, arms: Arms) -> str:
    """A row per metric, a column per arm."""
    columns = [[name, *(formatted(metric, arms[name][metric]) for metric in bench.metrics)] for name in arms]
    names = ["", *bench.metrics]
    texts = ["", *(METRICS[metric] for metric in bench.metrics)]
    widths = [max(map(len, column)) for column in (names, texts, *columns)]
    return "\n".join(
        f"{name:{widths[0]}}  {text:{widths[1]}}"
        + "".join(cell.rjust(width + 2) for cell, width in zip(cells, widths[2:], strict=True))
        for name, text, *cells in zip(names, texts, *columns, strict=True)
    )


def formatted(metric: str, value: Any) -> str:
    """E.g. ("kv_util", 0.941) -> "94.1%", ("flops", 5.2e14) -> "521.7 TFLOP", ("itl_p50", None) -> "-"."""
    if value is None:
        return "-"
    if metric == "flops":
        return f"{value / 1e12:,.1f} TFLOP"
    if metric in GIGABYTES:
        return f"{value / 1e9:,.1f} GB"
    if metric == "kv_util":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _short(value: Any) -> str:
    """A side of a claim. Tokens are only counted: there are too many to print."""
    if isinstance(value, tuple):
        return f"{sum(map(len, value)):,} tokens"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}"
