"""The statistics of several engines: counters that survive a restart, and the sum of all.

Milestone: M10. vLLM counterpart: none; there each engine has its own, and so has Prometheus, see metrics/replicas.py.

Row 1: no torch.
"""

from collections.abc import Sequence
from dataclasses import replace

from folovllm.outputs import NO_STATS, EngineStats

COUNTERS = (  # these never fall
    "num_steps",
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "preempted_prefix_cache_queries",
    "preempted_prefix_cache_hits",
)
GAUGES = ("num_running", "num_waiting", "num_used_slots", "num_reserved_slots", "num_scheduled_tokens")
SHARES = ("kv_cache_usage", "prefix_cache_hit_rate")  # these are averaged


class ReplicaStats:
    """The statistics of one replica. `total` counts from the start of the server, through all restarts."""

    def __init__(self) -> None:
        self.total = self._before = NO_STATS

    def update(self, stats: EngineStats) -> None:
        """Takes the newest snapshot of the engine that runs now."""
        if self._before is NO_STATS:
            self.total = stats
        else:
            sums = {name: getattr(stats, name) + getattr(self._before, name) for name in COUNTERS}
            self.total = replace(stats, **sums)

    def restart(self) -> None:
        """The engine has died. The next one begins to count from 0."""
        counters = {name: getattr(self.total, name) for name in COUNTERS}
        self.total = self._before = replace(NO_STATS, **counters)


def sum_stats(replicas: Sequence[EngineStats], num_unsent: int) -> EngineStats:
    """All replicas as one engine. `num_unsent` requests wait for a replica."""
    sums = {name: sum(getattr(stats, name) for stats in replicas) for name in COUNTERS + GAUGES}
    means = {name: sum(getattr(stats, name) for stats in replicas) / len(replicas) for name in SHARES}
    sums["num_waiting"] += num_unsent
    return EngineStats(**sums, **means, replicas=tuple(replicas))
