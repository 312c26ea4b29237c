"""Pairs of measurements, a peer's and ours, so that drift of the machine hits both; then medians and ratios.

Milestone: M4. vLLM counterpart: none. No torch. With the peers a and b, the first repeat runs "ours a, ours b", the
second one "a ours, b ours", the third one as the first.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from folovllm.benchmarks.metrics import median_of
from folovllm.benchmarks.workloads import prompt_length
from scripts.peers.catalog import OURS, PeerError

Result = dict[str, Any]
Measure = Callable[[str], Result]  # name of an engine -> its result; raises PeerError if it has none


class OursFailedError(RuntimeError):
    """Our own engine gave no result."""


# ---- pairs


@dataclass(frozen=True)
class Pair:
    """A measurement of our engine and one of `peer`, one directly after the other."""

    repeat: int
    peer: str
    ours_first: bool

    @property
    def order(self) -> tuple[str, str]:
        return (OURS, self.peer) if self.ours_first else (self.peer, OURS)


@dataclass
class PairRuns:
    """What the complete pairs of one peer gave; `error` is what the peer failed with."""

    results: list[dict[str, Result]] = field(default_factory=list)  # {OURS: ..., peer: ...}
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


def _measure_pair(pair: Pair, measure: Measure) -> dict[str, Result]:
    results = {}
    for name in pair.order:
        try:
            results[name] = measure(name)
        except PeerError as error:
            if name == OURS:
                raise OursFailedError(str(error)) from None
            raise
    return results


# ---- figures


def speed_name(mode: str) -> str:
    """The figure that a mode is compared by: tokens of the prompts in a prompt mode, else tokens of output."""
    return "prompt_tok_per_s" if prompt_length(mode) else "output_tok_per_s"


def spread(values: Sequence[float]) -> Result:
    """The median, and what it hides. E.g. [3, 1, 2] -> median 2, min 1, max 3."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": list(values)}


def summarise_engine(results: Sequence[Result], modes: Sequence[str]) -> Result:
    """One engine over its measurements: load times and speed per mode."""
    first = results[0]
    speeds = {mode: [result["modes"][mode][speed_name(mode)] for result in results] for mode in modes}
    return {
        "version": first.get("version"),
        "settings": first.get("settings"),
        "load": median_of([result["load"] for result in results]),
        "modes": {mode: {speed_name(mode): spread(values)} for mode, values in speeds.items()},
    }


def summarise_peer(run: PairRuns, name: str, modes: Sequence[str]) -> Result:
    """One peer, and in each mode `ratio`: our speed over the peer's, pair by pair."""
    if not run.results:
        return {"ok": False, "error": run.error}
    summary = summarise_engine([pair[name] for pair in run.results], modes)
    for mode, figures in summary["modes"].items():
        speed = speed_name(mode)
        pairs = [(pair[OURS]["modes"][mode], pair[name]["modes"][mode]) for pair in run.results]
        figures["ratio"] = spread([mine[speed] / theirs[speed] for mine, theirs in pairs])
        figures["same_first_token"] = same_first_token(pairs[0][0]["tokens"], pairs[0][1]["tokens"])
    return {"ok": run.error is None, "error": run.error, "num_pairs": len(run.results), **summary}


def same_first_token(mine: list[list[int]], theirs: list[list[int]]) -> str:
    """Requests whose first token is the same: few of them would mean that the peer was asked something else.

    Not all of them, since rounding and 4-bit weights tip near-ties.
    """
    equal = sum(a[:1] == b[:1] for a, b in zip(mine, theirs, strict=True))
    return f"{equal}/{len(mine)}"


def summarise_ours(runs: dict[str, PairRuns], modes: Sequence[str]) -> Result:
    """Ours over the pairs with all peers."""
    results = [pair[OURS] for run in runs.values() for pair in run.results]
    if not results:
        return {"ok": False, "error": "no complete pair"}
    summary = summarise_engine(results, modes)
    if "single" in summary["modes"]:
        reads = [result["modes"]["single"]["decode_bytes_per_second"] for result in results]
        summary["modes"]["single"]["decode_bytes_per_second"] = spread(reads) if all(reads) else None
    return {"ok": True, "error": None, "num_pairs": len(results), **summary}


def add_floor(engines: dict[str, Result], bandwidth: Result | None, weight_bytes: int) -> Result:
    """The speed at which a single stream would do nothing but read the weights, and each engine's share of it.

    Only for engines that read the weights in the dtype of the run: fewer bits have a higher floor.
    """
    if bandwidth is None:
        return {"error": "the bandwidth probe failed"}
    floor = bandwidth["bytes_per_second"] / weight_bytes
    for engine in engines.values():
        single = engine.get("modes", {}).get("single")
        if single is not None and not engine["fewer_bits"]:
            single["floor_share"] = single["output_tok_per_s"]["median"] / floor
            read = single.get("decode_bytes_per_second")
            single["bandwidth_share"] = read["median"] / bandwidth["bytes_per_second"] if read else None
    return {**bandwidth, "weight_bytes_per_token": weight_bytes, "floor_tok_per_s": floor}
