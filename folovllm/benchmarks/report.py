"""What a reader sees: tables on stdout, and the files.

Milestone: M1. vLLM counterpart: the printed summary of vllm/benchmarks/serve.py. No torch.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from folovllm.benchmarks.ablation import ablation_table
from folovllm.benchmarks.groups import groups_table
from folovllm.benchmarks.tables import make_table, mib, modes_of, num, share

MIN_WIDTH = 150  # a pipe has no width: the tables should still be whole
JSON_DEPTH = 6  # deeper than this is written on one line
GB = 1e9


def write_files(result: dict[str, Any], folder: Path, now: datetime) -> list[Path]:
    """Write the JSON and the plots to `folder`; returns their paths."""
    from folovllm.benchmarks import plot

    result["date"] = now.isoformat(timespec="seconds")
    run = result["run"]
    stem = f"compare_perf_{run['workload']['name']}_{run['device']}_{now:%Y%m%d-%H%M%S}"
    json_path = folder / f"{stem}.json"
    json_path.write_text(to_json(result) + "\n")
    return [json_path, *plot.write_plots(result, folder, stem)]


def to_json(value: Any, depth: int = 0) -> str:
    """JSON that a person can read: outer levels on lines of their own, inner ones and lists of numbers compact."""
    if not isinstance(value, (dict, list)) or not value or depth >= JSON_DEPTH or _is_flat_list(value):
        return json.dumps(value, ensure_ascii=False)
    pad, closing = " " * (2 * depth + 2), " " * (2 * depth)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(str(key))}: {to_json(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{closing}}}"
    return "[\n" + ",\n".join(f"{pad}{to_json(item, depth + 1)}" for item in value) + f"\n{closing}]"


def _is_flat_list(value: Any) -> bool:
    """A list of numbers, or of lists of numbers."""
    if not isinstance(value, list):
        return False
    return all(isinstance(item, (int, float, list)) for item in value)


def print_tables(result: dict[str, Any], files: list[Path], console: Console | None = None) -> None:
    console = console or Console(soft_wrap=True)
    if console.width < MIN_WIDTH:
        console.width = MIN_WIDTH
    console.print(_headline(result))
    console.print(speed_table(result))
    for table in (groups_table(result), ablation_table(result)):
        if table.row_count:
            console.print(table)
    console.print(memory_table(result))
    if any(arm.get("sweep") for arm in result["arms"].values()):
        console.print(sweep_table(result))
    if result["fit"]:
        console.print(fit_table(result))
    console.print(equality_table(result))
    for line in problems(result):
        console.print(f"[bold red]{line}[/]")
    for path in files:
        console.print(f"wrote {path}", highlight=False)


def _headline(result: dict[str, Any]) -> str:
    machine, run, bandwidth = result["machine"], result["run"], result["bandwidth"]
    speed = f"{bandwidth['bytes_per_second'] / GB:.1f} GB/s" if "bytes_per_second" in bandwidth else "unknown"
    return (
        f"{run['model']} {run['dtype']} on {machine.get('gpu') or machine['cpu']}, {run['threads']} threads, "
        f"memory reads {speed}; workload {run['workload']['name']}, {run['repeats']} repeat(s); "
        f"max_model_len {run['max_model_len']}, KV {mib(run['kv_cache_memory'])}"
    )


def speed_table(result: dict[str, Any]) -> Table:
    title = "Throughput and latency (medians; milliseconds)"
    ratio = f"x {result['reference']}"
    columns = ("arm", "mode", "out tok/s", ratio, "total tok/s", "TTFT mean", "p50", "p99", "TPOT p50", "p99")
    table = make_table(title, *columns, "ITL p50", "p99")
    for name, mode, figures in modes_of(result):
        ttft, tpot, itl = figures["ttft_ms"], figures["tpot_ms"], figures["itl_ms"]
        table.add_row(
            name,
            mode,
            num(figures["output_tok_per_s"]),
            num(figures["ratio"], 2),
            num(figures["total_tok_per_s"]),
            *(num(ttft[key]) for key in ("mean", "p50", "p99")),
            *(num(summary[key]) for summary in (tpot, itl) for key in ("p50", "p99")),
        )
    return table


def memory_table(result: dict[str, Any]) -> Table:
    title = "Memory and cache"
    columns = (
        "arm",
        "mode",
        "KV allocated",
        "fit at full length",
        "KV reserved peak",
        "KV used/reserved",
        "max running",
    )
    table = make_table(
        title, *columns, "preempted", "decode GB/s", "of bandwidth", "peak RSS", "peak GPU", "import + load s"
    )
    for name, mode, figures in modes_of(result):
        arm, kv = result["arms"][name], result["arms"][name]["kv_cache"]
        table.add_row(
            name,
            mode,
            mib(kv["allocated_bytes"]) if kv else "grows",
            str(kv["fits_at_full_length"]) if kv else "-",
            mib(figures["kv_reserved_bytes_peak"]),
            share(figures["kv_utilisation"]),
            num(figures["max_running"], 0),
            num(figures["preemptions"], 0),
            num(figures["decode_bytes_per_second"], 1, GB),
            share(figures["bandwidth_share"]),
            mib(arm["memory"]["peak_rss_bytes"]),
            mib(arm["memory"]["peak_gpu_bytes"]),
            f"{arm['load']['import_seconds']:.1f} + {arm['load']['load_seconds']:.1f}",
        )
    return table


def sweep_table(result: dict[str, Any]) -> Table:
    """Rows: requests sent at once. Columns: arms."""
    arms = {name: arm["sweep"] for name, arm in result["arms"].items() if arm.get("sweep")}
    title = "Output tok/s against requests sent at once (most that ran together)"
    table = make_table(title, "requests", *arms)
    for points in zip(*arms.values(), strict=True):
        cells = [f"{num(point['output_tok_per_s'])} ({point['max_running']:.0f})" for point in points]
        table.add_row(str(int(points[0]["batch_size"])), *cells)
    return table


def fit_table(result: dict[str, Any]) -> Table:
    title = "Requests running at the same time in the same KV bytes"
    table = make_table(
        title, "arm", "KV allocated", "max running", "mean running", "preempted", "KV used/reserved", "out tok/s"
    )
    for name, fit in result["fit"].items():
        if fit["ok"]:
            table.add_row(
                name,
                mib(fit["kv_cache"]["allocated_bytes"]),
                num(fit["max_running"], 0),
                num(fit["mean_running"]),
                num(fit["preemptions"], 0),
                share(fit["kv_utilisation"]),
                num(fit["output_tok_per_s"]),
            )
    return table


def equality_table(result: dict[str, Any]) -> Table:
    must = result["run"]["dtype"] == "float32"
    rule = "float32: must be equal" if must else f"{result['run']['dtype']}: rounding may tip near-ties"
    title = f"Greedy tokens ({rule})"
    table = make_table(
        title, "tokens of", "compared with", "requests equal", "first differences (request: position)", "verdict"
    )
    for row in result["equality"]:
        differences = ", ".join(f"{index}: {position}" for index, position in row["first_differences"].items())
        verdict = "equal" if not differences else "differ" if row["ok"] else "[bold red]MUST BE EQUAL[/]"
        equal = f"{row['num_equal']}/{row['num_requests']}"
        table.add_row(row["tokens_of"], row["compared_with"], equal, differences or "-", verdict)
    return table


def problems(result: dict[str, Any]) -> list[str]:
    """Everything that a reader must not miss."""
    lines = [f"{name} failed: {arm['error']}" for name, arm in result["arms"].items() if not arm["ok"]]
    lines += [f"{name} (fit) failed: {fit['error']}" for name, fit in result["fit"].items() if not fit["ok"]]
    if result["bandwidth"].get("error"):
        lines.append(f"the bandwidth probe failed: {result['bandwidth']['error']}")
    unequal = [f"{row['tokens_of']} vs {row['compared_with']}" for row in result["equality"] if not row["ok"]]
    if unequal:
        lines.append(f"tokens differ in float32: {'; '.join(unequal)}")
    for name, mode, figures in modes_of(result):
        if not figures["repeats_equal"]:
            lines.append(f"{name} {mode}: the repeats gave different tokens")
    return lines
