"""From time stamps and counters to figures: throughput, latencies, cache utilisation, bytes per second.

Milestone: M1. vLLM counterpart: the metrics of vllm/benchmarks/serve.py. No torch: plain arithmetic, tested by hand.

TTFT (time to first token) runs from a request's arrival to its first token, so in a batch it includes the queue. ITL
(inter-token latency) is every single gap between two tokens of a request; TPOT (time per output token) is their mean
within one request. A TPOT percentile is thus over requests, an ITL percentile over all gaps.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from folovllm.hf_config import ModelArchitecture

MAX_SERIES_POINTS = 200  # of a curve kept in the JSON


@dataclass(frozen=True)
class RequestTiming:
    """What one request cost: seconds from arrival to its first token, and the gaps between its later ones."""

    prompt_len: int
    output_len: int
    time_to_first_token: float
    inter_token_latencies: list[float]
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache

    @property
    def decode_time(self) -> float:
        return sum(self.inter_token_latencies)

    @property
    def time_per_output_token(self) -> float | None:
        """Mean gap in seconds; None for a single token, which has no gap."""
        gaps = self.inter_token_latencies
        return sum(gaps) / len(gaps) if gaps else None


@dataclass(frozen=True)
class StepSample:
    """The engine after one step. `num_running` counts those who ran in it, also the ones it finished."""

    seconds: float  # since the start of the mode
    num_running: int
    num_used_slots: int
    num_reserved_slots: int


def percentile(values: Iterable[float], q: float) -> float | None:
    """The q-th percentile (0..100), linear between neighbours; None of nothing. E.g. [1, 2, 3, 4] at 50 -> 2.5."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * q / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latency_summary(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and 99th percentile, in milliseconds."""
    ms = [value * 1e3 for value in seconds]
    mean = sum(ms) / len(ms) if ms else None
    return {"mean": mean, "p50": percentile(ms, 50), "p99": percentile(ms, 99)}


def speed_figures(timings: Sequence[RequestTiming], seconds: float) -> dict[str, Any]:
    """Throughput and latencies of one mode; `seconds` is from the first arrival to the last token, prompts included."""
    output_tokens = sum(timing.output_len for timing in timings)
    prompt_tokens = sum(timing.prompt_len for timing in timings)
    tpots = [timing.time_per_output_token for timing in timings]
    return {
        "num_requests": len(timings),
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "output_tok_per_s": output_tokens / seconds,
        "total_tok_per_s": (prompt_tokens + output_tokens) / seconds,
        "cached_tokens": sum(timing.num_cached_tokens for timing in timings),
        "cached_share": sum(timing.num_cached_tokens for timing in timings) / max(prompt_tokens, 1),
        **latency_figures(timings),
        "tpot_ms": latency_summary([tpot for tpot in tpots if tpot is not None]),
    }


def latency_figures(timings: Sequence[RequestTiming]) -> dict[str, Any]:
    return {
        "ttft_ms": latency_summary([timing.time_to_first_token for timing in timings]),
        "itl_ms": latency_summary([gap for timing in timings for gap in timing.inter_token_latencies]),
    }


def group_figures(groups: Sequence[str], timings: Sequence[RequestTiming]) -> dict[str, Any]:
    """Latencies and cache hits per group of requests, in the order in which the groups appear.

    `groups[i]` is the group of `timings[i]`; "" is none. E.g. {"decoding": {...}, "long": {...}}. `gaps` is what the
    first request of the group saw: [seconds since it arrived, milliseconds since its token before] for every token.
    """
    found: dict[str, list[RequestTiming]] = {}
    for group, timing in zip(groups, timings, strict=True):
        found.setdefault(group, []).append(timing)
    return {group: _one_group(members) for group, members in found.items() if group}


def _one_group(timings: list[RequestTiming]) -> dict[str, Any]:
    prompt_tokens = sum(timing.prompt_len for timing in timings)
    cached_tokens = sum(timing.num_cached_tokens for timing in timings)
    first = timings[0]
    times = list(accumulate(first.inter_token_latencies, initial=first.time_to_first_token))[1:]
    gaps = [[round(when, 4), round(gap * 1e3, 3)] for when, gap in zip(times, first.inter_token_latencies, strict=True)]
    return {
        "num_requests": len(timings),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "cached_share": cached_tokens / max(prompt_tokens, 1),
        **latency_figures(timings),
        "gaps": gaps,
    }


def kv_figures(samples: Sequence[StepSample], kv_bytes_per_token: int) -> dict[str, Any]:
    """How the KV cache was used over the steps. Steps after which nobody holds a slot do not count."""
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
    seconds = sum(timing.decode_time for timing in timings)
    num_bytes = 0
    for timing in timings:
        num_steps = timing.output_len - 1
        num_kv_tokens = num_steps * timing.prompt_len + num_steps * (num_steps + 1) // 2
        num_bytes += num_steps * weight_bytes + num_kv_tokens * kv_bytes_per_token
    return num_bytes / seconds if seconds > 0 else None


def median_of(runs: Sequence[Any]) -> Any:
    """Medians of equally shaped results, leaf by leaf; what is not a number is taken from the first run."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: median_of([run[key] for run in runs]) for key in first}
    numbers = [run for run in runs if isinstance(run, (int, float)) and not isinstance(run, bool)]
    return statistics.median(numbers) if len(numbers) == len(runs) else first
