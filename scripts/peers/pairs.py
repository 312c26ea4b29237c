"""Who runs when: each measurement of a peer beside one of ours, so that drift of the machine hits both.

Milestone: M4. vLLM counterpart: none. No torch. With the peers a and b:

    repeat 1:  ours a   ours b      repeat 2:  a ours   b ours      repeat 3: as repeat 1
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.peers.catalog import OURS, PeerError

Measure = Callable[[str], dict[str, Any]]  # name of an engine -> its result; PeerError if it has none


@dataclass(frozen=True)
class Pair:
    """One measurement of ours and one of `peer`, one directly after the other."""

    repeat: int
    peer: str
    ours_first: bool

    @property
    def order(self) -> tuple[str, str]:
        return (OURS, self.peer) if self.ours_first else (self.peer, OURS)


@dataclass
class PairRuns:
    """What the complete pairs of one peer gave; `error` is what the peer failed with."""

    results: list[dict[str, dict[str, Any]]] = field(default_factory=list)  # {OURS: ..., peer: ...}
    error: str | None = None


def plan_pairs(peers: Sequence[str], repeats: int) -> list[Pair]:
    """All pairs in the order in which they run; the order within a pair is swapped in every second repeat."""
    return [Pair(repeat, peer, ours_first=repeat % 2 == 0) for repeat in range(repeats) for peer in peers]


def run_pairs(pairs: Sequence[Pair], measure: Measure, runs: dict[str, PairRuns]) -> None:
    """Measure the pairs into `runs`. A peer that failed is not tried again; if ours fails, there is no comparison."""
    for pair in pairs:
        run = runs.setdefault(pair.peer, PairRuns())
        if run.error is None:
            try:
                run.results.append(_measure_pair(pair, measure))
            except PeerError as error:
                run.error = str(error)


class OursFailedError(RuntimeError):
    """Our own engine gave no result."""


def _measure_pair(pair: Pair, measure: Measure) -> dict[str, dict[str, Any]]:
    results = {}
    for name in pair.order:
        try:
            results[name] = measure(name)
        except PeerError as error:
            if name == OURS:
                raise OursFailedError(str(error)) from None
            raise
    return results
