"""What a reader sees of a run: a table in vLLM's order, warnings in red, a progress bar before.

Milestone: M8. vLLM counterpart: the printed summary of vllm/benchmarks/serve.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from folovllm.benchmarks.machine import commit_of
from folovllm.benchmarks.report import num
from folovllm.benchmarks.serve.options import ServeOptions

TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (excl. first token)",
    "itl": "Inter-token latency (per chunk)",
    "e2el": "End-to-end latency",
}
WIDTH, LABEL = 58, 44
Result = dict[str, Any]
Lines = list[tuple[str, str | None]]  # label and value; no value: a heading


class ProgressBar:
    """Counts answers on stderr. It is drawn twice a second: client and server share the cores."""

    def __init__(self, count: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("answers"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(file=sys.stderr), refresh_per_second=2, transient=True)
        self._task = self._bar.add_task("", total=count)

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_result(result: Result, options: ServeOptions, files: list[Path]) -> None:
    console = Console(soft_wrap=True)
    console.print(headline(result), highlight=False)
    for label, value in lines(result, options):
        console.print(f" {label} ".center(WIDTH, "-") if value is None else f"{label:<{LABEL}}{value:>{WIDTH - LABEL}}",
            highlight=False, markup=False)  # fmt: skip
    for line in result["warnings"]:
        console.print(f"warning: {line}", style="bold red", markup=False, highlight=False)
    for path in files:
        console.print(f"wrote {path}", highlight=False)


def headline(result: Result) -> str:
    """What was sent and where it ran: two lines, above the table and on the picture."""
    run, machine = result["run"], result["machine"]
    burst = "" if run["burstiness"] == 1 else f", burstiness {run['burstiness']:g}"
    rate = "all at once" if run["request_rate"] == "inf" else f"{run['request_rate']:g} requests/s{burst}"
    limit = f", at most {run['max_concurrency']} at once" if run["max_concurrency"] else ""
    return (
        f"{run['model']}, {run['num_prompts']} requests ({run['dataset_name']}), {rate}{limit}\n"
        f"{machine['cpu']}, {machine['usable_cores']} cores shared by client and server if it is local, "
        f"commit {commit_of(machine)}, {result['date'][:10]}"
    )


def lines(result: Result, options: ServeOptions) -> Lines:
    figures, client = result["figures"], result["client"]
    goodput = [("Request goodput (req/s):", num(figures["request_goodput"], 2))] if options.goodput else []
    table: Lines = [
        ("Serving benchmark result", None),
        ("Successful requests:", num(figures["completed"], 0)),
        ("Failed requests:", num(figures["failed"], 0)),
        ("Benchmark duration (s):", num(figures["duration"], 2)),
        ("Total input tokens:", num(figures["total_input_tokens"], 0)),
        ("Total generated tokens:", num(figures["total_output_tokens"], 0)),
        ("Request throughput (req/s):", num(figures["request_throughput"], 2)),
        *goodput,
        ("Output token throughput (tok/s):", num(figures["output_throughput"], 2)),
        ("Total token throughput (tok/s):", num(figures["total_token_throughput"], 2)),
        ("Peak concurrent requests:", num(figures["max_concurrent_requests"], 0)),
        ("Tokens per chunk:", num(figures["tokens_per_chunk"], 2)),
    ]
    for name in options.percentile_metrics:
        short = name.upper()
        table += [(TITLES[name], None), (f"Mean {short} (ms):", num(figures[f"mean_{name}_ms"], 2))]
        table += [(f"P{q:g} {short} (ms):", num(figures[f"p{q:g}_{name}_ms"], 2)) for q in options.metric_percentiles]
    return [
        *table,
        ("The client itself", None),
        ("CPU time (s):", num(client["cpu_seconds"], 2)),
        ("CPU time (share of one core):", f"{client['cpu_share']:.0%}"),
        ("P99 lateness of a send (ms):", num(client["p99_send_lag_ms"], 2)),
        ("P99 lateness of a time stamp (ms):", num(client["p99_loop_lag_ms"], 2)),
    ]
