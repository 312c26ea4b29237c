"""ArmTask: what one process of the benchmark is asked to do; plain data that travels to it as JSON.

Milestone: M1. vLLM counterpart: none. No torch: the parent process never loads it, so that it costs no memory or time
beside the arms.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from folovllm import milestones
from folovllm.entrypoints.bench.workloads import Workload, make_workload

BASELINE = "hf"
BANDWIDTH = "bandwidth"  # not an arm: measures the memory


@dataclass(frozen=True)
class ArmTask:
    """One arm, measured once. `arm` is "hf", "bandwidth" or a preset with rungs taken off, e.g. "m3" or "m3-m2"."""

    arm: str
    model_path: str
    vocab_size: int
    workload: str
    num_requests: int | None
    modes: tuple[str, ...]
    device: str  # "cpu" | "cuda"
    dtype: str
    threads: int
    max_model_len: int
    kv_cache_memory: int  # bytes
    batch_sizes: tuple[int, ...] = ()
    bandwidth_bytes: int = 1024**3

    def make_workload(self) -> Workload:
        return make_workload(self.workload, self.vocab_size, self.num_requests)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ArmTask":
        plain: dict[str, Any] = json.loads(text)
        return cls(**plain | {"modes": tuple(plain["modes"]), "batch_sizes": tuple(plain["batch_sizes"])})


def split_arm(arm: str) -> tuple[str, tuple[str, ...]]:
    """Preset and rungs left out. E.g. "m3-m2" -> ("m3", ("m2",)). ValueError if there is no such engine."""
    preset, *without = arm.split("-")
    milestones.fold(preset, without)
    return preset, tuple(without)


def default_arms() -> list[str]:
    """Every rung that is built and has an engine."""
    return [rung.id for rung in milestones.LADDER if rung.built and rung.id != "m0"]
