"""From time stamps and counters to figures: throughput, latencies, cache use, bytes per second, medians, ratios.

Milestone: M1; groups and ablation came with M5. vLLM counterpart: the metrics of vllm/benchmarks/serve.py. No torch:
plain arithmetic, tested by hand.

TTFT (time to first token) runs from a request's arrival to its first token, so in a batch it includes the queue. ITL
(inter-token latency) is every single gap between two tokens of a request; TPOT (time per output token) is their mean
within one request. A TPOT percentile is thus over requests, an ITL percentile over all gaps.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from folovllm import milestones
from folovllm.benchmarks.arms import BASELINE, RequestTiming, StepSample
from folovllm.hf_config import ModelArchitecture
from folovllm.utils import percentile

MAX_SERIES_POINTS = 200  # of a curve kept in the JSON
LATENCIES = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("itl_ms", "p50"), ("itl_ms", "p99"))

Tokens = list[list[int]]  # per request


def latency_summary(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and 99th percentile, in milliseconds."""
    ms = [value * 1e3 for value in seconds]
    mean = sum(ms) / len(ms) if ms else None
    return {"mean": mean, "p50": percentile(ms, 50), "p99": percentile(ms, 99)}


def speed_figures(timings: Sequence[RequestTiming], seconds: float) -> dict[str, Any]:
    """Throughput and latencies of one mode; `seconds` is from the first arrival to the last token, prompts included."""
    output_tokens = sum(timing.output_len for timing in timings)
    cache = cache_figures(timings)
    tpots = [timing.time_per_output_token for timing in timings]
    return {
        "num_requests": len(timings),
        "seconds": seconds,
        **cache,
        "output_tokens": output_tokens,
        "output_tok_per_s": output_tokens / seconds,
        "total_tok_per_s": (cache["prompt_tokens"] + output_tokens) / seconds,
        **latency_figures(timings),
        "tpot_ms": latency_summary([tpot for tpot in tpots if tpot is not None]),
    }


def cache_figures(timings: Sequence[RequestTiming]) -> dict[str, Any]:
    """Prompt tokens, and how many of them were found in the prefix cache."""
    prompt_tokens = sum(timing.prompt_len for timing in timings)
    cached_tokens = sum(timing.num_cached_tokens for timing in timings)
    share = cached_tokens / max(prompt_tokens, 1)
    return {"prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens, "cached_share": share}


def latency_figures(timings: Sequence[RequestTiming]) -> dict[str, Any]:
    return {
        "ttft_ms": latency_summary([timing.time_to_first_token for timing in timings]),
        "itl_ms": latency_summary([gap for timing in timings for gap in timing.inter_token_latencies]),
    }


def group_figures(groups: Sequence[str], timings: Sequence[RequestTiming]) -> dict[str, Any]:
    """Latencies and cache hits per group of requests, in the order in which the groups appear.

    `groups[i]` is the group of `timings[i]`; "" is none. E.g. {"decoding": {...}, "long": {...}}.
    """
    found: dict[str, list[RequestTiming]] = {}
    for group, timing in zip(groups, timings, strict=True):
        found.setdefault(group, []).append(timing)
    return {
        group: {
            "num_requests": len(members),
            **cache_figures(members),
            **latency_figures(members),
            "gaps": gaps_of(members[0]),
        }
        for group, members in found.items()
        if group
    }


def gaps_of(timing: RequestTiming) -> list[list[float]]:
    """What one request saw: [seconds since it arrived, milliseconds since its token before] for every later token."""
    gaps = timing.inter_token_latencies
    times = list(accumulate(gaps, initial=timing.time_to_first_token))[1:]
    return [[round(when, 4), round(gap * 1e3, 3)] for when, gap in zip(times, gaps, strict=True)]


def kv_figures(samples: Sequence[StepSample], kv_bytes_per_token: int) -> dict[str, Any]:
    """How the KV cache was used over the steps. Steps after which no request holds a slot do not count."""
    held = [sample for sample in samples if sample.num_reserved_slots]
    shares = [sample.num_used_slots / sample.num_reserved_slots for sample in held]
    return {
        "num_steps": len(samples),
        "max_running": max((sample.num_running for sample in samples), default=0),
        "mean_running": sum(sample.num_running for sample in samples) / max(len(samples), 1),
        "kv_utilisation": sum(shares) / len(shares) if shares else None,
        "kv_reserved_bytes_peak": max((s.num_reserved_slots for s in samples), default=0) * kv_bytes_per_token,
        "kv_used_bytes_peak": max((s.num_used_slots for s in samples), default=0) * kv_bytes_per_token,
    }


def kv_series(samples: Sequence[StepSample]) -> list[list[float]]:
    """The curve behind `kv_utilisation`, thinned out: [seconds, running, used slots, reserved slots] per point."""
    stride = max(1, math.ceil(len(samples) / MAX_SERIES_POINTS))
    return [[round(s.seconds, 4), s.num_running, s.num_used_slots, s.num_reserved_slots] for s in samples[::stride]]


def weight_bytes_per_token(arch: ModelArchitecture, dtype_bytes: int) -> int:
    """Bytes of weights that one decode step at batch size 1 must read, unquantised.

    All of them, but of an untied input embedding only one row is read. E.g. SmolLM2-135M in bf16: 269 MB (tied).
    """
    unread = 0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size
    return (arch.num_parameters() - unread) * dtype_bytes


def decode_bytes_per_second(
    timings: Sequence[RequestTiming], weight_bytes: int, kv_bytes_per_token: int
) -> float | None:
    """Bytes a single-stream decode had to read (weights and its own K/V), over the time between tokens.

    E.g. a prompt of 10 tokens and 3 out: two decode steps, over 11 and 12 tokens of K/V. Prefill is not in it.
    """
    seconds = sum(sum(timing.inter_token_latencies) for timing in timings)
    num_bytes = 0
    for timing in timings:
        num_steps = timing.output_len - 1
        num_kv_tokens = num_steps * timing.prompt_len + num_steps * (num_steps + 1) // 2
        num_bytes += num_steps * weight_bytes + num_kv_tokens * kv_bytes_per_token
    return num_bytes / seconds if seconds > 0 else None


# ---- medians over the repeats, and ratios between arms


@dataclass
class ArmRuns:
    """What the processes of one arm answered; `error` is what its last one failed with."""

    results: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def median_of(runs: Sequence[Any]) -> Any:
    """Medians of equally shaped results, leaf by leaf; what is not a number is taken from the first run."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: median_of([run[key] for run in runs]) for key in first}
    numbers = [run for run in runs if isinstance(run, (int, float)) and not isinstance(run, bool)]
    return statistics.median(numbers) if len(numbers) == len(runs) else first


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
        "tokens_sha256": hashlib.sha256(json.dumps(tokens[0], separators=(",", ":")).encode()).hexdigest(),
        "repeats_equal": all(other == tokens[0] for other in tokens[1:]),
        "kv_series": repeats[0]["kv_series"],
    }


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


def ablation_rows(arms: dict[str, dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """What each rung is worth: one row per mode and arm; `names[0]` has everything on.

    `worth` is the throughput with everything on over the throughput without that rung. E.g. 1.5: the rung makes it 1.5
    times as fast. Rungs work together, so the factors do not multiply to the whole: paging is worth little where few
    requests run, prefix caching nothing where no prompt repeats. Arms that failed are left out.
    """
    modes = arms[names[0]].get("modes", {})
    return [
        _ablation_row(name, mode, arms[name]["modes"][mode], all_on)
        for mode, all_on in modes.items()
        for name in names
        if "modes" in arms[name]
    ]


def _ablation_row(name: str, mode: str, figures: dict[str, Any], all_on: dict[str, Any]) -> dict[str, Any]:
    off = name.partition("-")[2]
    return {
        "arm": name,
        "mode": mode,
        "off": off or None,
        "title": milestones.get_rung(off).title if off else None,
        "output_tok_per_s": figures["output_tok_per_s"],
        "worth": all_on["output_tok_per_s"] / figures["output_tok_per_s"] if off else None,
        **{f"{key}_{q}": figures[key][q] for key, q in LATENCIES},
    }


# ---- whether the arms gave the same tokens


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
    """All comparisons: each mode with the baseline's and with our first arm's; and each arm's modes with each other.

    The baseline's own batch against its single shows what rounding alone does there. An arm's warm against its cold
    shows that what it found in the prefix cache is what it would have computed.
    """
    tokens = {
        arm: {mode: figures["tokens"] for mode, figures in run.results[0]["modes"].items()}
        for arm, run in runs.items()
        if run.results
    }
    ours = [arm for arm in tokens if arm != BASELINE]
    pairs = [(arm, BASELINE) for arm in ours if BASELINE in tokens] + [(arm, ours[0]) for arm in ours[1:]]
    rows = [
        equality_row(f"{arm} {mode}", found, f"{reference} {mode}", tokens[reference][mode], must_be_equal)
        for arm, reference in pairs
        for mode, found in tokens[arm].items()
    ]
    for arm, modes in tokens.items():
        if len(modes) == 2:  # the baseline has both of its own, too
            (first, before), (second, after) = modes.items()
            rows.append(equality_row(f"{arm} {second}", after, f"{arm} {first}", before, must_be_equal))
    return rows
