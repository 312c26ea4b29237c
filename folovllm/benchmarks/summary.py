"""From the runs of all arms to one result: medians over repeats, ratios, and who gave the same tokens.

Milestone: M1. vLLM counterpart: none. No torch.
"""

import hashlib
import json
from typing import Any

from folovllm.benchmarks.measure import median_of
from folovllm.benchmarks.runner import ArmRuns
from folovllm.benchmarks.task import BASELINE

Tokens = list[list[int]]  # per request


def summarise_arm(runs: ArmRuns) -> dict[str, Any]:
    """Medians of one arm's repeats; `kv_series` is the first repeat's, and all repeats must give the same tokens."""
    if not runs.results:
        return {"ok": False, "error": runs.error}
    first = runs.results[0]
    medians = {key: median_of([run[key] for run in runs.results]) for key in ("load", "memory")}
    modes = {mode: _summarise_mode([run["modes"][mode] for run in runs.results]) for mode in first["modes"]}
    sweep = [median_of(points) for points in zip(*(run["sweep"] for run in runs.results), strict=True)]
    summary = {"settings": first["settings"], "kv_cache": first["kv_cache"], **medians, "modes": modes, "sweep": sweep}
    return {"ok": runs.error is None, "error": runs.error, "num_repeats": len(runs.results), **summary}


def _summarise_mode(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    figures = median_of([{k: v for k, v in run.items() if k not in ("tokens", "kv_series")} for run in repeats])
    tokens = [run["tokens"] for run in repeats]
    return {
        **figures,
        "output_tok_per_s_repeats": [run["output_tok_per_s"] for run in repeats],
        "tokens_sha256": tokens_digest(tokens[0]),
        "repeats_equal": all(other == tokens[0] for other in tokens[1:]),
        "kv_series": repeats[0]["kv_series"],
    }


def tokens_digest(tokens: Tokens) -> str:
    return hashlib.sha256(json.dumps(tokens, separators=(",", ":")).encode()).hexdigest()


def add_ratios(arms: dict[str, dict[str, Any]], bandwidth: float | None) -> str | None:
    """Add `ratio` (throughput over the reference's) and `bandwidth_share` to every mode; returns the reference's name.

    The reference is the first arm with a result: the baseline, where there is one.
    """
    measured = [name for name, arm in arms.items() if "modes" in arm]
    for name in measured:
        for mode, figures in arms[name]["modes"].items():
            reference = arms[measured[0]]["modes"][mode]["output_tok_per_s"]
            figures["ratio"] = figures["output_tok_per_s"] / reference
            speed = figures["decode_bytes_per_second"]
            figures["bandwidth_share"] = speed / bandwidth if speed and bandwidth else None
    return measured[0] if measured else None


def first_differences(ours: Tokens, reference: Tokens) -> dict[int, int]:
    """Request index -> position of the first token that differs. E.g. [[1, 2], [3]] and [[1, 5], [3]] -> {0: 1}.

    Only the requests that both have are compared.
    """
    differences = {}
    for index, (a, b) in enumerate(zip(ours, reference, strict=False)):
        if a != b:
            pairs = zip(a, b, strict=False)
            differences[index] = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    return differences


def equality_row(name: str, ours: Tokens, other_name: str, other: Tokens, must_be_equal: bool) -> dict[str, Any]:
    """One comparison. In float32 a difference is an error; in 16 bits rounding may tip a near-tie, and is reported."""
    differences = first_differences(ours, other)
    num_compared = min(len(ours), len(other))
    return {
        "tokens_of": name,
        "compared_with": other_name,
        "num_requests": num_compared,
        "num_equal": num_compared - len(differences),
        "first_differences": {str(index): position for index, position in differences.items()},
        "must_be_equal": must_be_equal,
        "ok": not (must_be_equal and differences),
    }


def equality_rows(runs: dict[str, ArmRuns], must_be_equal: bool) -> list[dict[str, Any]]:
    """All comparisons: in each mode with the baseline and with our first arm; and each arm's modes with each other.

    The baseline's own batch against its single shows what rounding alone does there; an arm's warm against its cold,
    that what it found in the prefix cache is what it would have computed.
    """
    tokens = {
        arm: {mode: figures["tokens"] for mode, figures in run.results[0]["modes"].items()}
        for arm, run in runs.items()
        if run.results
    }
    ours = [arm for arm in tokens if arm != BASELINE]
    references = [arm for arm in (BASELINE, *ours[:1]) if arm in tokens]
    rows = []
    for reference in references:
        for arm in ours[ours.index(reference) + 1 :] if reference in ours else ours:
            for mode in tokens[arm]:
                theirs = tokens[reference][mode]
                rows.append(
                    equality_row(f"{arm} {mode}", tokens[arm][mode], f"{reference} {mode}", theirs, must_be_equal)
                )
    for arm, modes in tokens.items():
        if len(modes) == 2:  # the baseline has both of its own, too
            (first, before), (second, after) = modes.items()
            rows.append(equality_row(f"{arm} {second}", after, f"{arm} {first}", before, must_be_equal))
    return rows
