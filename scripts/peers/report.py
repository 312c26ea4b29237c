"""What a reader sees of a comparison: one table, in the terminal and in Markdown, and the files.

Milestone: M4. vLLM counterpart: none. No torch. `scripts/dev/fill_results.py` makes its tables here too.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from folovllm.benchmarks.report import MIN_WIDTH, to_json

MODE_TITLES = {"single": "one by one", "batch": "together"}
LEFT_COLUMNS = 2  # the rest are numbers


def write_files(result: dict[str, Any], folder: Path, now: datetime) -> list[Path]:
    """Write JSON, Markdown and picture to `folder`; returns their paths."""
    from scripts.peers.plot import write_plot

    result["date"] = now.isoformat(timespec="seconds")
    stem = folder / f"compare_peers_{result['run']['workload']['name']}_cpu_{now:%Y%m%d-%H%M%S}"
    json_path, markdown_path = stem.with_suffix(".json"), stem.with_suffix(".md")
    json_path.write_text(to_json(result) + "\n")
    markdown_path.write_text(markdown(result, json_path.name))
    return [json_path, markdown_path, *write_plot(result, stem.with_suffix(".png"))]


def headline(result: dict[str, Any]) -> str:
    """Where and how, for the line above the table."""
    run, machine, bandwidth = result["run"], result["machine"], result["bandwidth"]
    speed = "memory bandwidth unknown"
    if "floor_tok_per_s" in bandwidth:
        speed = (
            f"memory reads {bandwidth['bytes_per_second'] / 1e9:.1f} GB/s: {run['dtype']} floor of a single stream "
            f"{bandwidth['floor_tok_per_s']:.0f} tok/s"
        )
    return (
        f"{machine['cpu']}, {run['threads']} threads, {speed}; output tokens per second with prompts, median of "
        f"{run['repeats']} pairs (lowest-highest)"
    )


def table_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row per engine: ours first."""
    requests = result["run"]["workload"]["num_requests"]
    columns = ["engine", "weights"]
    for mode in result["run"]["modes"]:
        columns += [f"{MODE_TITLES[mode]} ({requests[mode]}) tok/s"]
        columns += ["of the floor"] if mode == "single" else []
        columns += ["ours / its"]
    rows = [_row(engine, result["run"]["modes"]) for engine in result["arms"].values() if "modes" in engine]
    return [*columns, "import + load s", "version"], rows


def _row(engine: dict[str, Any], modes: list[str]) -> list[str]:
    cells = [engine["label"], engine["weights"]]
    for mode in modes:
        figures = engine["modes"][mode]
        cells += [_spread(figures["output_tok_per_s"], "{:.0f}")]
        if mode == "single":
            share = figures.get("floor_share")
            cells += ["-" if share is None else f"{share:.0%}"]
        cells += [_spread(figures["ratio"], "{:.2f}", "x") if "ratio" in figures else "-"]
    return [*cells, f"{sum(engine['load'].values()):.1f}", engine["version"] or "-"]


def _spread(value: dict[str, Any], form: str, unit: str = "") -> str:
    """E.g. "98 (95-101)", "1.90x (1.81-2.02)"; a single repeat has no spread."""
    low, middle, high = (form.format(value[key]) for key in ("min", "median", "max"))
    return f"{middle}{unit}" + (f" ({low}-{high})" if len(value["repeats"]) > 1 else "")


def markdown_table(result: dict[str, Any]) -> str:
    columns, rows = table_cells(result)
    marks = ["---"] * LEFT_COLUMNS + ["--:"] * (len(columns) - LEFT_COLUMNS)
    lines = [columns, *([["|".join(marks)]]), *rows]
    return "\n".join("|" + line[0] + "|" if len(line) == 1 else "| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(result: dict[str, Any], link: str) -> str:
    """The table with the facts that a reader of a number asks for first; `link` leads to the JSON."""
    git = result["machine"]["git"] or {"sha": "unknown", "dirty": False}
    commit = git["sha"][:10] + (" with changes" if git["dirty"] else "")
    lines = [
        f"`python {result['run']['command']}` on {headline(result)} ([all figures]({link}), commit {commit}).",
        "",
        markdown_table(result),
    ]
    return "\n".join(lines + [f"{line}\n" for line in problems(result)])


def problems(result: dict[str, Any]) -> list[str]:
    """Everything that a reader must not miss."""
    lines = [f"{name} failed: {arm['error']}" for name, arm in result["arms"].items() if not arm["ok"]]
    if "error" in result["bandwidth"]:
        lines.append(result["bandwidth"]["error"])
    return lines


def print_tables(result: dict[str, Any], files: list[Path]) -> None:
    console = Console(soft_wrap=True)
    console.width = max(console.width, MIN_WIDTH)
    console.print(headline(result), highlight=False)
    columns, rows = table_cells(result)
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < LEFT_COLUMNS else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in problems(result):
        console.print(line, style="bold red", markup=False, highlight=False)
    for path in files:
        console.print(f"wrote {path}", highlight=False)
