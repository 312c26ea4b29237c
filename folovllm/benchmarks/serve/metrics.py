"""From answers to figures: throughput, latencies, goodput, failures, and the client's own part in them.

Milestone: M8. vLLM counterpart: `calculate_metrics` in vllm/benchmarks/serve.py, whose names of figures are kept, so
that the same tools can read a result. No torch: plain arithmetic, tested by hand. What TTFT, TPOT and ITL are is said
where they are computed, in answers.py. A TTFT or TPOT percentile is over requests, an ITL percentile over all gaps.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from folovllm.benchmarks.serve.answers import Answer
from folovllm.benchmarks.serve.load import LoadRun
from folovllm.utils import percentile

LATENCIES = ("ttft", "tpot", "itl", "e2el")
LATE = 0.01  # seconds: a request that the client sent later than this after its time was late
Figures = dict[str, Any]


def serve_figures(
    answers: Sequence[Answer], seconds: float, goodput: dict[str, float], percentiles: Sequence[float]
) -> Figures:
    """The figures of one run of `seconds`. Only completed requests count, except in `failed` and `errors`."""
    good = [answer for answer in answers if answer.error is None]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    tokens_in, tokens_out = (sum(getattr(a, f"{side}_tokens") or 0 for a in good) for side in ("prompt", "output"))
    num_chunks = sum(len(answer.token_times) for answer in good)
    return {
        "duration": seconds,
        "completed": len(good),
        "failed": sum(errors.values()),
        "errors": dict(errors.most_common()),
        "uncounted": sum(answer.output_tokens is None for answer in good),
        "without_text": sum(not answer.token_times for answer in good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(meets(answer, goodput) for answer in good) / seconds if goodput else None,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "max_concurrent_requests": max((count for _, count in in_flight(answers)), default=0),
        "tokens_per_chunk": tokens_out / num_chunks if num_chunks else None,
        **{key: value for name in LATENCIES for key, value in _summary(name, good, percentiles).items()},
    }


def seconds_of(name: str, answer: Answer) -> list[float]:
    """One latency of one answer: a single number, except for the gaps of "itl". Empty if the answer has none."""
    if name == "itl":
        return answer.inter_token_latencies
    value = {"ttft": answer.ttft, "tpot": answer.tpot, "e2el": answer.e2e_latency}[name]
    return [] if value is None else [value]


def _summary(name: str, answers: Sequence[Answer], percentiles: Sequence[float]) -> Figures:
    """E.g. {"mean_ttft_ms": ..., "median_ttft_ms": ..., "std_ttft_ms": ..., "p99_ttft_ms": ...}."""
    ms = [1e3 * seconds for answer in answers for seconds in seconds_of(name, answer)]
    return {
        f"mean_{name}_ms": statistics.fmean(ms) if ms else None,
        f"median_{name}_ms": percentile(ms, 50),
        f"std_{name}_ms": statistics.pstdev(ms) if ms else None,
        **{f"p{q:g}_{name}_ms": percentile(ms, q) for q in percentiles},
    }


def meets(answer: Answer, goodput: dict[str, float]) -> bool:
    """Whether an answer kept every promise, e.g. {"ttft": 500, "tpot": 50} in milliseconds.

    A latency that the answer does not have, such as TPOT with one token, breaks no promise.
    """
    return all(1e3 * seconds <= limit for name, limit in goodput.items() for seconds in seconds_of(name, answer))


def in_flight(answers: Sequence[Answer]) -> list[tuple[float, int]]:
    """(second, requests that are sent and not yet answered from then on), failed ones included."""
    steps = Counter[float]()
    for answer in answers:
        steps[answer.sent] += 1
        steps[answer.ended] -= 1
    points, count = [], 0
    for moment in sorted(steps):
        count += steps[moment]
        points.append((moment, count))
    return points


def client_figures(run: LoadRun) -> Figures:
    """What the client did to the measurement: how late it sent, how late it stamped, how much CPU it took."""
    lags = [seen.ready - seen.due for seen in run.exchanges]
    return {
        "cpu_seconds": run.cpu_seconds,
        "cpu_share": run.cpu_seconds / run.seconds,  # of one core
        "late_sends": sum(lag > LATE for lag in lags),
        "p99_send_lag_ms": 1e3 * (percentile(lags, 99) or 0.0),
        "max_send_lag_ms": 1e3 * max(lags, default=0.0),
        "p99_loop_lag_ms": 1e3 * (percentile(run.loop_lags, 99) or 0.0),
        "held_back": sum(seen.sent - seen.ready > LATE for seen in run.exchanges),
    }


def warnings(figures: Figures, client: Figures, num_requests: int, wanted_tokens: int | None) -> list[str]:
    """Everything that a reader of the figures must not miss. `wanted_tokens`: of all completed ones, if forced."""
    lines = [f"{count} failed: {error}" for error, count in figures["errors"].items()]
    if figures["uncounted"]:
        lines.append(f"{figures['uncounted']} answers came without usage: their tokens and TPOT are not counted")
    if figures["without_text"]:
        lines.append(f"{figures['without_text']} answers brought no text: they have no TTFT")
    if wanted_tokens is not None and not figures["uncounted"] and figures["total_output_tokens"] != wanted_tokens:
        found = figures["total_output_tokens"]
        lines.append(f"{found} tokens instead of {wanted_tokens}: the server ignores ignore_eos, or shortened answers")
    if client["late_sends"]:
        lines.append(
            f"the client sent {client['late_sends']} of {num_requests} requests more than {1e3 * LATE:.0f} ms late "
            f"(at most {client['max_send_lag_ms']:.0f} ms): the load was not the one asked for"
        )
    if client["held_back"]:
        lines.append(f"--max-concurrency held {client['held_back']} requests back: their wait is not in the TTFT")
    return lines
