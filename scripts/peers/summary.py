"""From the pairs of all peers to one result: medians, spreads, ratios.

Milestone: M4. vLLM counterpart: none. No torch.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from folovllm.benchmarks.measure import median_of
from scripts.peers.catalog import OURS
from scripts.peers.pairs import PairRuns

Results = Sequence[dict[str, Any]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median, and what it hides. E.g. [3, 1, 2] -> median 2, min 1, max 3."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": list(values)}


def summarise_engine(results: Results, modes: Sequence[str]) -> dict[str, Any]:
    """One engine over its measurements: load times and throughput per mode."""
    first = results[0]
    return {
        "version": first.get("version"),
        "settings": first.get("settings"),
        "load": median_of([result["load"] for result in results]),
        "modes": {mode: {"output_tok_per_s": speeds(results, mode)} for mode in modes},
    }


def speeds(results: Results, mode: str) -> dict[str, Any]:
    return spread([result["modes"][mode]["output_tok_per_s"] for result in results])


def summarise_peer(run: PairRuns, name: str, modes: Sequence[str]) -> dict[str, Any]:
    """One peer, and in each mode `ratio`: our throughput over the peer's, pair by pair."""
    if not run.results:
        return {"ok": False, "error": run.error}
    summary = summarise_engine([pair[name] for pair in run.results], modes)
    for mode, figures in summary["modes"].items():
        pairs = [(pair[OURS]["modes"][mode], pair[name]["modes"][mode]) for pair in run.results]
        figures["ratio"] = spread([mine["output_tok_per_s"] / theirs["output_tok_per_s"] for mine, theirs in pairs])
        figures["same_first_token"] = same_first_token(pairs[0][0]["tokens"], pairs[0][1]["tokens"])
    return {"ok": run.error is None, "error": run.error, "num_pairs": len(run.results), **summary}


def same_first_token(mine: list[list[int]], theirs: list[list[int]]) -> str:
    """Requests whose first token is the same: few of them would mean that the peer was asked something else.

    Not all of them, since rounding and 4-bit weights tip near-ties.
    """
    equal = sum(a[:1] == b[:1] for a, b in zip(mine, theirs, strict=True))
    return f"{equal}/{len(mine)}"


def summarise_ours(runs: dict[str, PairRuns], modes: Sequence[str]) -> dict[str, Any]:
    """Ours over all pairs, whoever the other one was."""
    results = [pair[OURS] for run in runs.values() for pair in run.results]
    if not results:
        return {"ok": False, "error": "no complete pair"}
    summary = summarise_engine(results, modes)
    if "single" in summary["modes"]:
        reads = [result["modes"]["single"]["decode_bytes_per_second"] for result in results]
        summary["modes"]["single"]["decode_bytes_per_second"] = spread(reads) if all(reads) else None
    return {"ok": True, "error": None, "num_pairs": len(results), **summary}


def add_floor(engines: dict[str, Any], bandwidth: dict[str, Any] | None, weight_bytes: int) -> dict[str, Any]:
    """The speed at which a single stream would do nothing but read the weights, and everybody's share of it.

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
