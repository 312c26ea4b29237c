"""What a reader sees of a comparison: its tables, in the terminal and in Markdown, and the files.

Milestone: M4. vLLM counterpart: none. No torch. `scripts/dev/fill_results.py` makes its tables here too. A few modes
are columns of the table of engines. Prompts of many lengths are a table of their own, with a row per length.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.arms import in_words
from folovllm.benchmarks.machine import commit_of
from folovllm.benchmarks.report import Row, share, show, write_json
from folovllm.benchmarks.workloads import prompt_length
from scripts.peers.catalog import NATIVE
from scripts.peers.comparison import speed_name

MODE_TITLES = {"single": "one by one", "batch": "together"}
FIGURES = {
    "output_tok_per_s": "output tokens per second with prompts",
    "prompt_tok_per_s": "prompt tokens per second",
}
MIN_LENGTHS = 3  # of prompts, for a table of their own
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
    show(headline(result), {"": engine_rows(result), "prompts": prompt_rows(result)}, problems(result), files)


def headline(result: Result) -> str:
    """Where and how, for the line above the table."""
    run, machine, bandwidth = result["run"], result["machine"], result["bandwidth"]
    speed = "memory bandwidth unknown"
    if "floor_tok_per_s" in bandwidth:
        speed = (
            f"memory reads {bandwidth['bytes_per_second'] / 1e9:.1f} GB/s: {run['dtype']} floor of a single stream "
            f"{bandwidth['floor_tok_per_s']:.0f} tok/s"
        )
    shown = " and ".join(FIGURES[name] for name in dict.fromkeys(map(speed_name, run["modes"])))
    pairs = f"median of {run['repeats']} pairs (lowest-highest)" if run["repeats"] > 1 else "one pair each"
    model = f"{run['model']}, " if run.get("random_weights") else ""
    return f"{machine['cpu']}, {model}{run['threads']} threads{condition(run)}, {speed}; {shown}, {pairs}"


def condition(run: Result) -> str:
    """What was unlike an idle machine with all its instructions. E.g. ", beside 1 busy process, limited to AVX2"."""
    busy, isa = run.get("busy", 0), run.get("cpu_isa", NATIVE)  # older result files have neither
    beside = f", beside {busy} busy process{'es' if busy > 1 else ''}" if busy else ""
    return beside + (f", limited to {isa.upper()}" if isa != NATIVE else "")


def lengths_apart(run: Result) -> list[str]:
    """The prompt modes, if they are so many that they have a table and a panel of their own."""
    prompts = [mode for mode in run["modes"] if prompt_length(mode)]
    return prompts if len(prompts) >= MIN_LENGTHS else []


def column_modes(run: Result) -> list[str]:
    """The modes that are columns of the table of engines."""
    return [mode for mode in run["modes"] if mode not in lengths_apart(run)]


def title_of(mode: str) -> str:
    length = prompt_length(mode)
    return f"prompts of {length:,}" if length else MODE_TITLES[mode]


def engine_rows(result: Result) -> list[Row]:
    """A row per engine, ours first."""
    return [_row(engine, result["run"]) for engine in result["arms"].values() if "modes" in engine]


def _row(engine: Result, run: Result) -> Row:
    row = {"engine": in_words(engine["label"]), "weights": engine["weights"]}
    for mode in column_modes(run):
        figures, title = engine["modes"][mode], title_of(mode)
        row[f"{title} ({run['workload']['num_requests'][mode]}) tok/s"] = _spread(figures[speed_name(mode)], "{:.0f}")
        if mode == "single":
            row["of the floor"] = share(figures.get("floor_share"))
        row[f"ours / its, {title}"] = _spread(figures["ratio"], "{:.2f}", "x") if "ratio" in figures else "-"
    return row | {"import + load s": f"{sum(engine['load'].values()):.1f}", "version": engine["version"] or "-"}


def prompt_rows(result: Result) -> list[Row]:
    """A row per length of the prompts; an engine's columns are its speed and, for a peer, ours over its."""
    engines = [engine for engine in result["arms"].values() if "modes" in engine]
    rows = []
    for mode in lengths_apart(result["run"]) if engines else []:
        row = {"prompt tokens": f"{prompt_length(mode):,}"}
        for engine in engines:
            figures, label = engine["modes"][mode], in_words(engine["label"])
            row[f"{label} tok/s"] = _spread(figures[speed_name(mode)], "{:,.0f}")
            if "ratio" in figures:
                row[f"ours / {label}"] = _spread(figures["ratio"], "{:.2f}", "x")
        rows.append(row)
    return rows


def _spread(value: Result, form: str, unit: str = "") -> str:
    """E.g. "98 (95-101)", "1.90x (1.81-2.02)"; a single repeat has no spread."""
    low, middle, high = (form.format(value[key]) for key in ("min", "median", "max"))
    return f"{middle}{unit}" + (f" ({low}-{high})" if len(value["repeats"]) > 1 else "")


def markdown(result: Result, link: str) -> str:
    """The table with the facts that a reader of a number asks for first; `link` leads to the JSON."""
    facts = f"[all figures]({link}), commit {commit_of(result['machine'])}"
    lines = [f"`python {result['run']['command']}` on {headline(result)} ({facts}).", ""]
    lines.append(markdown_table(engine_rows(result), LEFT_COLUMNS))
    if rows := prompt_rows(result):
        lines.append(markdown_table(rows))
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
