"""What a reader sees of a comparison: one table, in the terminal and in Markdown, and the files.

Milestone: M4. vLLM counterpart: none. No torch. `scripts/dev/fill_results.py` makes its tables here too.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.arms import in_words
from folovllm.benchmarks.machine import commit_of
from folovllm.benchmarks.report import Row, share, show, write_json

MODE_TITLES = {"single": "one by one", "batch": "together"}
LEFT_COLUMNS = 2  # the rest are numbers
Result = dict[str, Any]


def write_files(result: Result, folder: Path, now: datetime) -> list[Path]:
    """Write JSON, Markdown and picture to `folder`; returns their paths."""
    from scripts.peers.plot import write_plot

    result["date"] = now.isoformat(timespec="seconds")
    stem = folder / f"compare_peers_{result['run']['workload']['name']}_cpu_{now:%Y%m%d-%H%M%S}"
    json_path, markdown_path = write_json(result, stem.with_suffix(".json")), stem.with_suffix(".md")
    markdown_path.write_text(markdown(result, json_path.name))
    return [json_path, markdown_path, *write_plot(result, stem.with_suffix(".png"))]


def print_result(result: Result, files: list[Path]) -> None:
    show(headline(result), {"": engine_rows(result)}, problems(result), files)


def headline(result: Result) -> str:
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


def engine_rows(result: Result) -> list[Row]:
    """A row per engine, ours first."""
    return [_row(engine, result["run"]) for engine in result["arms"].values() if "modes" in engine]


def _row(engine: Result, run: Result) -> Row:
    row = {"engine": in_words(engine["label"]), "weights": engine["weights"]}
    for mode in run["modes"]:
        figures, title = engine["modes"][mode], MODE_TITLES[mode]
        row[f"{title} ({run['workload']['num_requests'][mode]}) tok/s"] = _spread(figures["output_tok_per_s"], "{:.0f}")
        if mode == "single":
            row["of the floor"] = share(figures.get("floor_share"))
        row[f"ours / its, {title}"] = _spread(figures["ratio"], "{:.2f}", "x") if "ratio" in figures else "-"
    return row | {"import + load s": f"{sum(engine['load'].values()):.1f}", "version": engine["version"] or "-"}


def _spread(value: Result, form: str, unit: str = "") -> str:
    """E.g. "98 (95-101)", "1.90x (1.81-2.02)"; a single repeat has no spread."""
    low, middle, high = (form.format(value[key]) for key in ("min", "median", "max"))
    return f"{middle}{unit}" + (f" ({low}-{high})" if len(value["repeats"]) > 1 else "")


def markdown(result: Result, link: str) -> str:
    """The table with the facts that a reader of a number asks for first; `link` leads to the JSON."""
    facts = f"[all figures]({link}), commit {commit_of(result['machine'])}"
    table = markdown_table(engine_rows(result), LEFT_COLUMNS)
    lines = [f"`python {result['run']['command']}` on {headline(result)} ({facts}).", "", table]
    return "\n".join(lines + [f"{line}\n" for line in problems(result)])


def markdown_table(rows: Sequence[Row], left: int = 0) -> str:
    """Rows with the same columns, of which the first `left` stand on the left."""
    if not rows:
        return ""
    marks = ["---"] * left + ["--:"] * (len(rows[0]) - left)
    lines = [" | ".join(rows[0]), *(" | ".join(row.values()) for row in rows)]
    return "\n".join([f"| {lines[0]} |", f"|{'|'.join(marks)}|", *(f"| {line} |" for line in lines[1:])]) + "\n"


def problems(result: Result) -> list[str]:
    """Everything that a reader must not miss."""
    lines = [f"{name} failed: {arm['error']}" for name, arm in result["arms"].items() if not arm["ok"]]
    if "error" in result["bandwidth"]:
        lines.append(result["bandwidth"]["error"])
    return lines
