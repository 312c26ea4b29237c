"""What a simulated run was like for its users and for its machine: latencies, goodput, use of memory and arithmetic.

Milestone: M5. vLLM counterpart: the metrics of vllm/benchmarks/serve.py. Row 1: no torch.

TTFT: from the arrival of a request to its first token. ITL: every gap between two of its tokens. E2E: from its arrival
to its last token. Goodput: how many requests per second were served within the SLO; a fast engine that serves every
request too late has a goodput of 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from folovllm.sim.cost import COMMUNICATION, COMPUTE, MEMORY, OVERHEAD, StepCost
from folovllm.utils import percentile


@dataclass(frozen=True)
class SLO:
    """What a user accepts (seconds): the first token after `ttft`, and no gap between tokens longer than `itl`."""

    ttft: float = 1.0
    itl: float = 0.1

    def __post_init__(self) -> None:
        if not (self.ttft > 0 and self.itl > 0):  # also refuses nan
            raise ValueError(f"an SLO of {self.ttft * 1e3:g} ms and {self.itl * 1e3:g} ms: both must be above 0")


@dataclass
class Served:
    """The times of one request (seconds)."""

    arrival: float
    prompt_len: int
    token_times: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at its first admission

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival

    @property
    def e2e(self) -> float:
        return self.token_times[-1] - self.arrival

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]

    def is_good(self, slo: SLO) -> bool:
        return self.ttft <= slo.ttft and max(self.gaps, default=0.0) <= slo.itl


def make_metrics(
    served: Sequence[Served], costs: Sequence[StepCost], kv: Sequence[tuple[float, float]], slo: SLO, **counters: float
) -> dict[str, Any]:
    """Returns the figures of a run that is over. Latencies are milliseconds, shares are 0..1.

    `kv` holds two shares per step: how many of the blocks are held, and how many slots of those hold K and V.
    """
    seconds = max(one.token_times[-1] for one in served) - min(one.arrival for one in served)
    output_tokens = sum(len(one.token_times) for one in served)
    num_good = sum(one.is_good(slo) for one in served)
    return {
        "seconds": seconds,
        "num_requests": len(served),
        "output_tokens": output_tokens,
        "output_tok_per_s": output_tokens / seconds,
        "total_tok_per_s": (output_tokens + sum(one.prompt_len for one in served)) / seconds,
        "ttft_ms": _latencies([one.ttft for one in served]),
        "itl_ms": _latencies([gap for one in served for gap in one.gaps]),
        "e2e_ms": _latencies([one.e2e for one in served]),
        "goodput": num_good / seconds,
        "good_share": num_good / len(served),
        "slo_ms": {"ttft": slo.ttft * 1e3, "itl": slo.itl * 1e3},
        "num_steps": len(costs),
        "kv_held_mean": _mean([held for held, _ in kv]),
        "kv_held_peak": max((held for held, _ in kv), default=0.0),
        "kv_filled": _mean([filled for _, filled in kv]),
        "bound_share": _bound_shares(costs),
        "communication_share": sum(cost.communication for cost in costs) / sum(cost.seconds for cost in costs),
        **counters,
    }


def _latencies(seconds: Sequence[float]) -> dict[str, float | None]:
    ms = [value * 1e3 for value in seconds]
    return {"p50": percentile(ms, 50), "p99": percentile(ms, 99)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _bound_shares(costs: Sequence[StepCost]) -> dict[str, float]:
    """The share of the busy time that was spent in steps which computing, reading, communication or the overhead "
    "bounds."""
    total = sum(cost.seconds for cost in costs)
    return {
        bound: sum(cost.seconds for cost in costs if cost.bound == bound) / total
        for bound in (COMPUTE, MEMORY, COMMUNICATION, OVERHEAD)
    }
