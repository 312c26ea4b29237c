"""Tables and how numbers stand in them, for all reports of the benchmark.

Milestone: M1. vLLM counterpart: none. No torch.
"""

from typing import Any

from rich.table import Table

LEFT = ("arm", "mode", "group", "tokens of", "compared with", "verdict", "switched off", "first differences")
LAST_MODES = ("batch", "warm")


def make_table(title: str, *names: str) -> Table:
    """A table with these columns; numbers stand on the right."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name.startswith(LEFT) else "right", no_wrap=name in ("arm", "mode"))
    return table


def modes_of(result: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(arm, mode, figures) for every mode that was measured, mode by mode so that arms stand together."""
    arms = result["arms"].items()
    found = [(name, mode, figures) for name, arm in arms for mode, figures in arm.get("modes", {}).items()]
    return sorted(found, key=lambda row: row[1] in LAST_MODES)  # stable: single and cold first


def num(value: float | None, digits: int = 1, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"
