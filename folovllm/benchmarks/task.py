"""ArmTask: what one process of the benchmark is asked to do; plain data that travels to it as JSON.

Milestone: M1. vLLM counterpart: none. No torch: the parent process never loads it, so that it costs no memory or time
beside the arms.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from folovllm import milestones
from folovllm.benchmarks.workloads import WORKLOADS, Workload, make_workload
from folovllm.config import engine_arg_names
from folovllm.sampling_params import unknown_name_message

BASELINE = "hf"
BANDWIDTH = "bandwidth"  # not an arm: measures the memory
WEIGHTS = "weights"  # not an arm: writes the checkpoint of a shape
SHORT_NAMES = {"budget": "max_num_batched_tokens"}


@dataclass(frozen=True)
class ArmTask:
    """One arm, measured once. `arm` is "hf", "bandwidth", "weights" or a preset as `parse_arm` reads it."""

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
    hit_rates: tuple[int, ...] = ()
    shape: str | None = None  # of random weights; None: model_path is a real model
    label: str = ""  # what to call it where one arm runs twice, with other workloads

    @property
    def name(self) -> str:
        return self.label or self.arm

    def make_workload(self) -> Workload:
        return make_workload(self.workload, self.vocab_size, self.num_requests, self.hit_rates)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ArmTask":
        plain: dict[str, Any] = json.loads(text)
        lists = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
        return cls(**plain | lists)


class ArmSpec(NamedTuple):
    """An engine of ours: a preset, rungs taken off, and engine arguments over it."""

    preset: str
    without: tuple[str, ...] = ()
    engine_args: Mapping[str, Any] = MappingProxyType({})


def parse_arm(arm: str) -> ArmSpec:
    """E.g. "m3-m2" -> m3 without m2; "m5+budget=256" -> m5 with max_num_batched_tokens=256.

    ValueError if there is no such milestone or engine argument.
    """
    ladder, *settings = arm.split("+")
    preset, *without = ladder.split("-")
    milestones.fold(preset, without)
    return ArmSpec(preset, tuple(without), dict(map(_parse_setting, settings)))


def _parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} in an arm is not of the form name=value, as in m5+budget=256")
    name = SHORT_NAMES.get(name, name)
    if name not in engine_arg_names():
        raise ValueError(unknown_name_message("engine argument", name, list(engine_arg_names())))
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a bare word, as in attention_backend=torch_flash


def split_arm(arm: str) -> tuple[str, tuple[str, ...]]:
    """Preset and rungs left out. E.g. "m3-m2" -> ("m3", ("m2",)). ValueError if there is no such engine."""
    spec = parse_arm(arm)
    return spec.preset, spec.without


def default_arms(workload: str = "A") -> list[str]:
    """Every rung that is built and has an engine, as far as it is one that the workload was made for."""
    built = [rung.id for rung in milestones.LADDER if rung.built and rung.id != "m0"]
    rungs = WORKLOADS[workload].rungs
    return [rung for rung in built if rungs is None or rung in rungs] or built[-1:]


def ablation_arms(top: str | None = None) -> list[str]:
    """All on, then each rung off alone, up to `top`. E.g. for m3: ["m3", "m3-m2", "m3-m3"]."""
    built = default_arms()
    up_to = built[: built.index(top) + 1] if top else built
    removable = [rung.id for rung in milestones.LADDER if rung.id in up_to and rung.off]
    return [up_to[-1], *(f"{up_to[-1]}-{rung}" for rung in removable)]
