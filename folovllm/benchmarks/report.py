"""What a reader sees of a result: tables on stdout, and the JSON file.

Milestone: M1; groups and ablation came with M5. vLLM counterpart: the printed summary of vllm/benchmarks/serve.py. No
torch. A table is a list of rows, each a dict from column to text, which pages show too (scripts/dev/fill_results.py).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from folovllm.benchmarks.arms import in_words
from folovllm.benchmarks.machine import commit_of
from folovllm.benchmarks.metrics import LATENCIES

MIN_WIDTH = 150  # a pipe has no width: the tables should still be whole
JSON_DEPTH = 6  # deeper than this is written on one line
WORDS = ("arm", "engine", "weights", "mode", "group", "switched off", "verdict")  # columns of words stand on the left
LEFT = (*WORDS, "tokens of", "compared with", "first differences")
LAST_MODES = ("batch", "warm")
GB = 1e9

Result = dict[str, Any]
Row = dict[str, str]


def write_json(result: Result, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(result) + "\n", encoding="utf-8")
    return path


def read_json(path: Path, schema: str) -> Result:
    """A result file. Raises ValueError if it is none of this schema."""
    result = json.loads(path.read_text(encoding="utf-8"))
    found = result.get("schema") if isinstance(result, dict) else None
    if found != schema:
        raise ValueError(f"{path} is no result file of schema {schema}; its schema is {found}")
    return result


def to_json(value: Any, depth: int = 0) -> str:
    """JSON that a person can read: outer levels on lines of their own, inner ones and lists of numbers compact."""
    is_flat = isinstance(value, list) and all(isinstance(item, (int, float, list)) for item in value)
    if not isinstance(value, (dict, list)) or not value or depth >= JSON_DEPTH or is_flat:
        return json.dumps(value, ensure_ascii=False)
    pad, closing = " " * (2 * depth + 2), " " * (2 * depth)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(str(key))}: {to_json(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{closing}}}"
    return "[\n" + ",\n".join(f"{pad}{to_json(item, depth + 1)}" for item in value) + f"\n{closing}]"


def num(value: float | None, digits: int = 1, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def name_arms(result: Result) -> Result:
    """The result as tables and plots show it: "m7 without m6" instead of "m7-m6", the name that the files keep."""
    arms, fit = ({in_words(name): value for name, value in result[key].items()} for key in ("arms", "fit"))
    equality = [row | {key: in_words(row[key]) for key in ("tokens_of", "compared_with")} for row in result["equality"]]
    reference = result["reference"] and in_words(result["reference"])
    return result | {"arms": arms, "fit": fit, "equality": equality, "reference": reference}


def modes_of(result: Result) -> list[tuple[str, str, Result]]:
    """(arm, mode, figures) for every mode that was measured, mode by mode so that arms stand together."""
    arms = result["arms"].items()
    found = [(name, mode, figures) for name, arm in arms for mode, figures in arm.get("modes", {}).items()]
    return sorted(found, key=lambda row: row[1] in LAST_MODES)  # stable: single and cold first


def make_table(title: str, rows: Sequence[Row]) -> Table:
    """A table of `rows`, which all have the same columns; words stand on the left, numbers on the right."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name.startswith(LEFT) else "right", no_wrap=name in ("arm", "mode"))
    for row in rows:
        table.add_row(*row.values())
    return table


def print_tables(result: Result, files: list[Path]) -> None:
    shown, dtype = name_arms(result), result["run"]["dtype"]
    rule = "float32: must be equal" if dtype == "float32" else f"{dtype}: rounding may tip near-ties"
    tables = {
        "Throughput and latency (medians; milliseconds)": speed_rows(shown),
        f"By group of requests ({shown['run']['workload']['name']}; milliseconds)": group_rows(shown),
        "Ablation: each rung off alone (worth: throughput with it over without it)": ablation_rows(shown),
        "Memory and cache": memory_rows(shown),
        "Output tok/s against requests sent at once (most that ran together)": sweep_rows(shown),
        "Requests running at the same time in the same KV bytes": fit_rows(shown),
        f"Greedy tokens ({rule})": equality_rows(shown),
    }
    show(headline(shown), tables, problems(shown), files)


def show(headline: str, tables: dict[str, list[Row]], problems: list[str], files: list[Path]) -> None:
    """A report: its headline, each table by its title unless it is empty, and what a reader must not miss in red."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, MIN_WIDTH)
    console.print(headline, highlight=False)
    for title, rows in tables.items():
        if rows:
            console.print(make_table(title, rows))
    for line in problems:
        console.print(line, style="bold red", markup=False, highlight=False)
    for path in files:
        console.print(f"wrote {path}", highlight=False)


def headline(result: Result) -> str:
    """What was run, where and when: two lines, above the tables and on the plots."""
    machine, run = result["machine"], result["run"]
    speed = result.get("bandwidth", {}).get("bytes_per_second")
    reads = f", memory reads {speed / GB:.1f} GB/s" if speed else ""
    return (
        f"{run['model']} {run['dtype']}, workload {run['workload']['name']}, median of {run['repeats']}, "
        f"max_model_len {run['max_model_len']}, KV {mib(run['kv_cache_memory'])}\n"
        f"{machine.get('gpu') or machine['cpu']}, {run['threads']} threads{reads}, commit {commit_of(machine)}, "
        f"{result['date'][:10]}"
    )


def speed_rows(result: Result) -> list[Row]:
    return [
        {
            "arm": name,
            "mode": mode,
            "out tok/s": num(figures["output_tok_per_s"]),
            f"x {result['reference']}": num(figures["ratio"], 2),
            "total tok/s": num(figures["total_tok_per_s"]),
            "TTFT mean": num(figures["ttft_ms"]["mean"]),
            **latency_cells(figures, ("ttft_ms", "tpot_ms", "itl_ms")),
        }
        for name, mode, figures in modes_of(result)
    ]


def latency_cells(figures: Result, keys: Sequence[str] = ("ttft_ms", "itl_ms")) -> Row:
    """E.g. {"TTFT p50": "12.0", "TTFT p99": "15.3", "ITL p50": ...}."""
    return {f"{key[:-3].upper()} {q}": num(figures[key][q]) for key in keys for q in ("p50", "p99")}


def group_rows(result: Result) -> list[Row]:
    """Figures per group of requests: the decoding ones and the long ones, each hit rate, each turn."""
    return [
        {
            "arm": name,
            "mode": mode,
            "group": group,
            "requests": num(found["num_requests"], 0),
            "prompt tokens": num(found["prompt_tokens"], 0),
            "from cache": share(found["cached_share"]),
            **latency_cells(found),
        }
        for name, mode, figures in modes_of(result)
        for group, found in figures.get("groups", {}).items()
    ]


def ablation_rows(result: Result) -> list[Row]:
    """Empty without --ablate."""
    return [
        {
            "switched off": rung_off(row),
            "mode": row["mode"],
            "out tok/s": num(row["output_tok_per_s"]),
            "worth": "" if row["worth"] is None else f"{row['worth']:.2f}x",
            **{f"{key[:-3].upper()} {q}": num(row[f"{key}_{q}"]) for key, q in LATENCIES},
        }
        for row in result.get("ablation", [])
    ]


def rung_off(row: Result) -> str:
    """E.g. "m5 Chunked prefill", or "nothing (m5)" for the arm with everything on."""
    return f"{row['off']} {row['title']}" if row["off"] else f"nothing ({row['arm']})"


def page_rows(result: Result) -> list[Row]:
    """What a page shows of a result with groups or an ablation: the rows of that table."""
    return ablation_rows(result) or group_rows(name_arms(result))


def memory_rows(result: Result) -> list[Row]:
    rows = []
    for name, mode, figures in modes_of(result):
        arm = result["arms"][name]
        kv = arm["kv_cache"]
        row = {
            "arm": name,
            "mode": mode,
            "KV allocated": mib(kv["allocated_bytes"]) if kv else "grows",
            "fit at full length": str(kv["fits_at_full_length"]) if kv else "-",
            "KV reserved peak": mib(figures["kv_reserved_bytes_peak"]),
            "KV used/reserved": share(figures["kv_utilisation"]),
            "max running": num(figures["max_running"], 0),
            "preempted": num(figures["preemptions"], 0),
            "decode GB/s": num(figures["decode_bytes_per_second"], 1, GB),
            "of bandwidth": share(figures["bandwidth_share"]),
            "peak RSS": mib(arm["memory"]["peak_rss_bytes"]),
            "peak GPU": mib(arm["memory"]["peak_gpu_bytes"]),
            "import + load s": " + ".join(num(arm["load"][f"{part}_seconds"]) for part in ("import", "load")),
        }
        rows.append(row)
    return rows


def sweep_rows(result: Result) -> list[Row]:
    """A row per number of requests sent at once, a column per arm."""
    arms = {name: arm["sweep"] for name, arm in result["arms"].items() if arm.get("sweep")}
    return [
        {"requests": num(points[0]["batch_size"], 0)}
        | {name: f"{num(p['output_tok_per_s'])} ({p['max_running']:.0f})" for name, p in zip(arms, points, strict=True)}
        for points in zip(*arms.values(), strict=True)
    ]


def fit_rows(result: Result) -> list[Row]:
    return [
        {
            "arm": name,
            "KV allocated": mib(fit["kv_cache"]["allocated_bytes"]),
            "max running": num(fit["max_running"], 0),
            "mean running": num(fit["mean_running"]),
            "preempted": num(fit["preemptions"], 0),
            "KV used/reserved": share(fit["kv_utilisation"]),
            "out tok/s": num(fit["output_tok_per_s"]),
        }
        for name, fit in result["fit"].items()
        if fit["ok"]
    ]


def equality_rows(result: Result) -> list[Row]:
    rows = []
    for row in result["equality"]:
        differences = ", ".join(f"{index}: {position}" for index, position in row["first_differences"].items())
        verdict = "equal" if not differences else "differ" if row["ok"] else "[bold red]MUST BE EQUAL[/]"
        shown = {
            "tokens of": row["tokens_of"],
            "compared with": row["compared_with"],
            "requests equal": f"{row['num_equal']}/{row['num_requests']}",
            "first differences (request: position)": differences or "-",
            "verdict": verdict,
        }
        rows.append(shown)
    return rows


def problems(result: Result) -> list[str]:
    """Everything that a reader must not miss."""
    lines = [f"{name} failed: {arm['error']}" for name, arm in result["arms"].items() if not arm["ok"]]
    lines += [f"{name} (fit) failed: {fit['error']}" for name, fit in result["fit"].items() if not fit["ok"]]
    if result["bandwidth"].get("error"):
        lines.append(f"the bandwidth probe failed: {result['bandwidth']['error']}")
    unequal = [f"{row['tokens_of']} vs {row['compared_with']}" for row in result["equality"] if not row["ok"]]
    if unequal:
        lines.append(f"tokens differ in float32: {'; '.join(unequal)}")
    unsteady = [f"{name} {mode}" for name, mode, figures in modes_of(result) if not figures["repeats_equal"]]
    return lines + [f"{what}: the repeats gave different tokens" for what in unsteady]
