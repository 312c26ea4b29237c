"""Replacement: one line of the answer of `accelerate`.

Milestone: M4. vLLM counterpart: none.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Replacement:
    """`count` times the same: `before` was replaced by `after`; or, with `after` None, it stays as it is."""

    switch: str  # the engine argument that asks for it, and whose off-state removes it
    before: str
    after: str | None
    why: str
    count: int = 1

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        change = f"{self.before} -> {self.after}" if self.after is not None else f"{self.before}: stays as it is"
        return f"{self.switch}: {times}{change} ({self.why})"


def grouped(replacements: Iterable[Replacement]) -> list[Replacement]:
    """Equal entries as one with their counts added, in the order of their first appearance."""
    counts: dict[Replacement, int] = {}
    for item in replacements:
        key = dataclasses.replace(item, count=1)
        counts[key] = counts.get(key, 0) + item.count
    return [dataclasses.replace(key, count=count) for key, count in counts.items()]
