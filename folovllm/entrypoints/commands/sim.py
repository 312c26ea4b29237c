"""`folovllm sim`: a workload on the real scheduler and a modelled machine, without a GPU and without weights.

Milestone: M5. vLLM counterpart: none. The work is done in folovllm/sim, without torch.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from folovllm import milestones
from folovllm.entrypoints.commands.options import parse_engine_args, parse_parts
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.links import LINKS
from folovllm.sim.metrics import SLO
from folovllm.sim.routing import PART, ROUTERS
from folovllm.sim.simulate import simulate
from folovllm.sim.workloads import SIM_WORKLOADS, make_sim_workload

# Text of a line -> where its number is in the metrics, and how it is written.
LINES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("output tokens per second", ("output_tok_per_s",), ",.0f"),
    ("all tokens per second", ("total_tok_per_s",), ",.0f"),
    ("TTFT p50, ms", ("ttft_ms", "p50"), ",.1f"),
    ("TTFT p99, ms", ("ttft_ms", "p99"), ",.1f"),
    ("ITL p50, ms", ("itl_ms", "p50"), ",.1f"),
    ("ITL p99, ms", ("itl_ms", "p99"), ",.1f"),
    ("E2E p50, ms", ("e2e_ms", "p50"), ",.0f"),
    ("E2E p99, ms", ("e2e_ms", "p99"), ",.0f"),
    ("goodput, requests per second", ("goodput",), ".2f"),
    ("requests within the SLO", ("good_share",), ".0%"),
    ("steps", ("num_steps",), ",d"),
    ("preemptions", ("preemptions",), ",d"),
    ("tokens hit in the prefix cache", ("prefix_hit_share",), ".0%"),
    ("KV blocks held, mean", ("kv_held_mean",), ".1%"),
    ("KV blocks held, peak", ("kv_held_peak",), ".1%"),
    ("held KV slots in use", ("kv_filled",), ".0%"),
    ("time bound by computing", ("bound_share", "compute"), ".0%"),
    ("time bound by memory reads", ("bound_share", "memory"), ".0%"),
    ("time bound by the overhead", ("bound_share", "overhead"), ".0%"),
)
# Shown only if there is something to show: several ranks or stages, several engines.
PARALLEL_LINES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("time spent in communication", ("communication_share",), ".0%"),
    ("busiest engine, times the mean", ("busiest_share",), ".2f"),
)
# Help texts of more than a line.
NUM_GPUS_HELP = (
    "So many machines count as one that is as many times as fast and as large, at no cost: the limit that --tp comes "
    "near to. With --tp or --replicas, each rank is so many."
)
ROUTER_HELP = (
    f"How the engines get their requests: {', '.join(ROUTERS)}. prefix (the default) takes the engine that knows most "
    "of the prompt, unless it has many more requests than another one; prefix-only has no such limit. Several, with "
    "commas: a column for each."
)


def sim(
    workload: Annotated[str, typer.Option(help=f"What users send: {', '.join(SIM_WORKLOADS)}.")] = "chat",
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shape, e.g. qwen3-0.6b or llama-3.1-70b.")
    ] = "qwen3-8b",
    gpu: Annotated[str, typer.Option(help=f"The machine: {', '.join(HARDWARE)}.")] = "h100",
    num_gpus: Annotated[int, typer.Option(help=NUM_GPUS_HELP)] = 1,
    tp: Annotated[
        int, typer.Option(help="tensor_parallel_size: so many ranks share every step, and pay for what they send.")
    ] = 1,
    link: Annotated[
        str | None, typer.Option(help=f"What connects the ranks: {', '.join(LINKS)}. Default: the machine's own.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="data_parallel_size: so many engines with all weights each.")] = 1,
    router: Annotated[str | None, typer.Option(help=ROUTER_HELP)] = None,
    weight_bits: Annotated[int, typer.Option(help="Bits per weight; the arithmetic stays bf16.")] = 16,
    preset: Annotated[
        str | None, typer.Option(help="The engine as of a milestone, e.g. m5. Default: the newest.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(metavar="MILESTONE", help="Leave one out. Repeatable.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="m1,m2,...", help="A column for each of these presets.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE.py:CLASS", help="Replace a part, e.g. core.scheduler=mine.py:Scheduler."),
    ] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any engine argument, e.g. max_num_seqs=32.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Users per second, as a Poisson process; 0: all at once. Default: the workload's."),
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests in all.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    slo_ttft: Annotated[float, typer.Option(help="Milliseconds until the first token that a user accepts.")] = 1_000.0,
    slo_itl: Annotated[float, typer.Option(help="Milliseconds between two tokens that a user accepts.")] = 100.0,
    trace: Annotated[str | None, typer.Option(metavar="FILE", help="Write every step; see folovllm trace.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Simulate a workload: the scheduler and the KV cache are real, the time of a step is a roofline.

    \b
      folovllm sim --workload long-prompts --compare m4,m5
      folovllm sim --model llama-3.1-70b --tp 4 --link pcie5 --rate 4
      folovllm sim --workload agents --replicas 8 --router random
      folovllm sim --workload memory-pressure --part core.scheduler=mine.py:Scheduler --trace run.jsonl
    """
    columns = _columns(_presets(preset, compare), _names(router or "prefix"))
    if trace is not None and len(columns) > 1:
        raise ValueError(
            "--trace writes one run: leave out --compare, name the milestone with --preset, and one router"
        )
    requests = make_sim_workload(workload, num_requests, rate, seed)
    args: dict[str, Any] = {"tensor_parallel_size": tp, "data_parallel_size": replicas}
    args |= parse_engine_args(engine_arg or ())
    parts = parse_parts(part or ())
    _check_counts(args, link, router, parts)
    results = {
        name: simulate(
            requests, model, gpu, num_gpus=num_gpus, weight_bits=weight_bits, link=link, without=without or (),
            parts=parts, slo=SLO(slo_ttft / 1e3, slo_itl / 1e3), trace=trace,
            **column | args,
        )
        for name, column in columns.items()
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(results if compare or len(results) > 1 else next(iter(results.values())), indent=1))
        return
    used_rate = SIM_WORKLOADS[workload].rate if rate is None else rate
    come = f"{used_rate:g} users per second" if used_rate else "all at once"
    machines = _machines(args, num_gpus, gpu)
    typer.echo(f"{model} on {machines}; {workload}: {num_requests} requests, {come}, seed {seed}")
    if part:
        typer.echo(f"with {', '.join(part)}")
    typer.echo(f"SLO: first token within {slo_ttft:g} ms, no gap over {slo_itl:g} ms. Times are modelled.\n")
    typer.echo(table(results))


def _check_counts(args: Mapping[str, Any], link: str | None, router: str | None, parts: Mapping[str, str]) -> None:
    """Raises ValueError for a link or a router that has nothing to connect."""
    if link is not None and args["tensor_parallel_size"] == args.get("pipeline_parallel_size", 1) == 1:
        raise ValueError(f"--link {link} connects ranks, and there is one: add e.g. --tp 4, or leave --link out")
    if args["data_parallel_size"] > 1:
        return
    if router is not None:
        raise ValueError(
            f"--router {router} chooses among engines, and there is one: add e.g. --replicas 4, or leave --router out"
        )
    if PART in parts:
        raise ValueError(f"the part {PART} chooses among engines, and there is one: add e.g. --replicas 4")


def _machines(args: dict[str, Any], num_gpus: int, gpu: str) -> str:
    """E.g. "8 x H100 SXM", or "8 x H100 SXM (4 engines of 2)"."""
    each = args["tensor_parallel_size"] * args.get("pipeline_parallel_size", 1) * num_gpus
    engines = args["data_parallel_size"]
    machines = f"{each * engines} x {HARDWARE[gpu].name}"
    return machines if engines == 1 else f"{machines} ({engines} engines of {each})"


def _columns(presets: list[str], routers: list[str]) -> dict[str, dict[str, Any]]:
    """The name of each column, and the arguments in which the columns differ."""
    if len(presets) > 1 and len(routers) > 1:
        raise ValueError("--compare and --router both name several columns: keep one of them to one name")
    if len(routers) > 1:
        return {name: {"preset": presets[0], "router": name} for name in routers}
    return {name: {"preset": name, "router": routers[0]} for name in presets}


def _names(text: str) -> list[str]:
    """E.g. "prefix, random" -> ["prefix", "random"]."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())) or [text]


def _presets(preset: str | None, compare: str | None) -> list[str]:
    if compare is None:
        return [preset or milestones.top_rung().id]
    if preset is not None:
        raise ValueError("--preset and --compare both choose the milestone: keep one")
    names = list(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip()))
    if not names:
        raise ValueError(f"--compare {compare!r} names no milestone; write e.g. --compare m1,m5")
    return names


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as text: a line per figure, a column per run."""
    shown = [
        line
        for line in PARALLEL_LINES
        if any(_value(metrics, line[1]) not in (0.0, 1.0) for metrics in results.values())
    ]
    lines = [*LINES, *shown]
    columns = [[name, *(_number(metrics, path, form) for _, path, form in lines)] for name, metrics in results.items()]
    names = ["", *(text for text, _, _ in lines)]
    widths = [max(map(len, column)) for column in (names, *columns)]
    return "\n".join(_row(cells, widths) for cells in zip(names, *columns, strict=True))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    return first.ljust(widths[0]) + "".join(cell.rjust(width + 2) for cell, width in zip(rest, widths[1:], strict=True))


def _number(metrics: dict[str, Any], path: tuple[str, ...], form: str) -> str:
    value = _value(metrics, path)
    return "-" if value is None else format(value, form)


def _value(metrics: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = metrics
    for name in path:
        value = value[name]
    return value
