"""What each rung is worth: all on beside all on but one.

Milestone: M5. vLLM counterpart: none. No torch. Rungs work together, so the factors do not multiply to the whole:
paging is worth little where few requests run, prefix caching nothing where no prompt repeats. The workload decides.
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from folovllm import milestones
from folovllm.benchmarks.tables import make_table, num

LATENCIES = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("itl_ms", "p50"), ("itl_ms", "p99"))


def ablation_rows(arms: dict[str, dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per mode and arm of ours; `names[0]` is all on. Arms that failed are left out.

    `worth`: throughput with all on over throughput without that rung. E.g. 1.5: the rung makes it 1.5 times as fast.
    """
    whole = arms[names[0]]
    if "modes" not in whole:
        return []
    rows = []
    for mode, all_on in whole["modes"].items():
        for name in names:
            if "modes" in arms[name]:
                rows.append(_row(name, mode, arms[name]["modes"][mode], all_on))
    return rows


def _row(name: str, mode: str, figures: dict[str, Any], all_on: dict[str, Any]) -> dict[str, Any]:
    off = name.partition("-")[2]
    latencies = {f"{key}_{q}": figures[key][q] for key, q in LATENCIES}
    return {
        "arm": name,
        "mode": mode,
        "off": off or None,
        "title": milestones.get_rung(off).title if off else None,
        "output_tok_per_s": figures["output_tok_per_s"],
        "worth": all_on["output_tok_per_s"] / figures["output_tok_per_s"] if off else None,
        **latencies,
    }


def row_name(row: dict[str, Any]) -> str:
    """E.g. "m5 Chunked prefill", or "nothing (m5)" for the arm with all on."""
    return f"{row['off']} {row['title']}" if row["off"] else f"nothing ({row['arm']})"


def ablation_table(result: dict[str, Any]) -> Table:
    """Empty without --ablate."""
    title = "Ablation: each rung off alone (worth: throughput with it over without it)"
    table = make_table(
        title, "switched off", "mode", "out tok/s", "worth", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"
    )
    for row in result.get("ablation", []):
        worth = "" if row["worth"] is None else f"{row['worth']:.2f}x"
        latencies = (num(row[f"{key}_{q}"]) for key, q in LATENCIES)
        table.add_row(row_name(row), row["mode"], num(row["output_tok_per_s"]), worth, *latencies)
    return table
