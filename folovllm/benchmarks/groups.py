"""Figures per group of requests: the decoding ones and the long ones, each hit rate, each turn.

Milestone: M5. vLLM counterpart: none. No torch.
"""

from typing import Any

from rich.table import Table

from folovllm.benchmarks.ablation import ablation_table
from folovllm.benchmarks.tables import make_table, modes_of, num, share


def groups_table(result: dict[str, Any]) -> Table:
    """Empty for a workload without groups."""
    columns = ("arm", "mode", "group", "requests", "prompt tokens", "from cache", "TTFT p50", "p99", "ITL p50", "p99")
    table = make_table(f"By group of requests ({result['run']['workload']['name']}; milliseconds)", *columns)
    for name, mode, figures in modes_of(result):
        for group, found in figures.get("groups", {}).items():
            latencies = (found[key][q] for key in ("ttft_ms", "itl_ms") for q in ("p50", "p99"))
            table.add_row(
                name,
                mode,
                group,
                num(found["num_requests"], 0),
                num(found["prompt_tokens"], 0),
                share(found["cached_share"]),
                *map(num, latencies),
            )
    return table


def page_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """The ablation or the groups as rows of text, for scripts/dev/fill_results.py; empty for other results."""
    table = ablation_table(result) if result.get("ablation") else groups_table(result)
    names = [str(column.header) for column in table.columns]
    # "p99" stands beside the column whose percentile it is.
    names = [f"{names[i - 1].split()[0]} p99" if name == "p99" else name for i, name in enumerate(names)]
    return [
        dict(zip(names, cells, strict=True)) for cells in zip(*(map(str, c.cells) for c in table.columns), strict=True)
    ]


def groups_of(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(arm, mode) -> its groups, where there are any."""
    return {(name, mode): figures["groups"] for name, mode, figures in modes_of(result) if figures.get("groups")}


def hit_rate_curves(groups: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """ "cold" and "warm" -> (hit rate, median TTFT in ms), rising. Groups are called "25% warm" and the like."""
    curves: dict[str, list[tuple[int, float]]] = {"cold": [], "warm": []}
    for name, figures in groups.items():
        rate, _, state = name.partition("% ")
        curves[state].append((int(rate), figures["ttft_ms"]["p50"]))
    return {state: sorted(points) for state, points in curves.items() if points}
