"""How long a step takes on a machine: the larger of computing and reading, and a constant (the roofline model).

Milestone: M5; ranks and what they say to each other: M10. vLLM counterpart: none. Left out: the time of sampling,
kernels that get slower for small batches, communication that hides behind computing, and everything that happens
outside of a step (tokenizing, HTTP).

    time = max(FLOPs / (peak * compute), bytes / bandwidth) + communication + overhead

With tensor parallelism every rank has its part of the FLOPs and of the bytes, and the ranks add up their results twice
per layer (communication_plan.py). With pipeline parallelism a step passes `num_stages` stages, and each takes its part
of the sum above.

Row 1: no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from folovllm.communication_plan import SEND, CommunicationPlan
from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ParallelConfig
from folovllm.sim.hardware import Hardware
from folovllm.sim.links import LINKS, Link, operation_seconds

COMPUTE, MEMORY, COMMUNICATION, OVERHEAD = "compute", "memory", "communication", "overhead"


@dataclass(frozen=True)
class Calibration:
    """What a real engine adds to the roofline of a machine."""

    compute: float  # share of the peak FLOP/s that its matrix products reach, 0..1
    overhead: float  # seconds per step that neither computing nor reading explains
    source: str


# Engine "plain" is plain torch (M1 to M3), "fast" has the kernels of M4. A test computes the CPU's rows again.
_LADDER = "milestones/m4/results/compare_perf_A_cpu.json"
CALIBRATIONS: dict[tuple[str, str], Calibration] = {
    ("cpu", "plain"): Calibration(0.51, 0.0298, f"m1, single stream, in {_LADDER}"),
    ("cpu", "fast"): Calibration(0.92, 0.0020, f"m4, single stream, in {_LADDER}"),
}
GPU_CALIBRATION = Calibration(0.7, 0.002, "assumed: no GPU has been measured")


def calibration_of(hardware: str, uses_plain_torch: bool) -> Calibration:
    """Returns the row of CALIBRATIONS for the machine called `hardware`; all GPUs share one assumption."""
    return CALIBRATIONS.get((hardware, "plain" if uses_plain_torch else "fast"), GPU_CALIBRATION)


def visible_pairs(computed: int, new: int) -> int:
    """The pairs (query, key) that the causal mask leaves to `new` tokens behind `computed` others."""
    return new * computed + new * (new + 1) // 2


def layer_weights(arch: ModelArchitecture) -> int:
    """The weights that every token is multiplied with: all but the embeddings and the head."""
    embeddings = (1 if arch.tie_word_embeddings else 2) * arch.vocab_size * arch.hidden_size
    return arch.num_parameters() - embeddings


def step_flops(arch: ModelArchitecture, work: Iterable[tuple[int, int]], num_sampled: int) -> float:
    """The operations of a step that computes `new` tokens behind `computed` others for each (computed, new)."""
    work = list(work)
    flops = 2.0 * layer_weights(arch) * sum(new for _, new in work)
    flops += 2.0 * arch.vocab_size * arch.hidden_size * num_sampled
    return flops + 4.0 * arch.num_hidden_layers * arch.q_size * sum(visible_pairs(*each) for each in work)


def kv_bytes(arch: ModelArchitecture, work: Iterable[tuple[int, int]], dtype_bytes: int) -> int:
    """The bytes of K and V that such a step moves: those of computed tokens are read, and the new ones are written."""
    return arch.kv_bytes_per_token(dtype_bytes) * sum(computed + new for computed, new in work)


@dataclass(frozen=True)
class StepCost:
    """One step: how much work it is, and how long it takes (seconds). Times are sums over the stages of a pipeline."""

    flops: float
    bytes: float
    compute: float
    memory: float
    overhead: float  # of one stage
    communication: float = 0.0
    num_stages: int = 1

    @property
    def stage_seconds(self) -> float:
        """How long one stage is busy with the step."""
        return (max(self.compute, self.memory) + self.communication) / self.num_stages + self.overhead

    @property
    def seconds(self) -> float:
        """How long the step takes from the first stage to the last, if it waits nowhere."""
        return self.stage_seconds * self.num_stages

    @property
    def bound(self) -> str:
        """What takes longest: COMPUTE, MEMORY, COMMUNICATION or OVERHEAD."""
        times = {
            COMPUTE: self.compute,
            MEMORY: self.memory,
            COMMUNICATION: self.communication,
            OVERHEAD: self.overhead * self.num_stages,
        }
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class CostModel:
    """A model on machines of one kind.

    `parallel` says over how many ranks it is divided, one per machine, and `link` connects the ranks of a stage;
    `stage_link` connects the stages. `num_gpus` machines stand in each rank's place and share its work without loss.
    """

    arch: ModelArchitecture
    hardware: Hardware
    calibration: Calibration
    num_gpus: int = 1
    dtype_bytes: int = 2  # of activations and of the KV cache
    weight_bits: int = 16
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    link: Link = LINKS["nvlink4"]
    stage_link: Link = LINKS["nvlink4"]

    @property
    def weight_bytes(self) -> float:
        """Of the whole model."""
        return self.arch.num_parameters() * self.weight_bits / 8

    @property
    def rank_weight_bytes(self) -> float:
        """Of one rank, as if embedding and head were divided among the stages as well."""
        return self.weight_bytes / self.parallel.world_size

    @property
    def memory(self) -> float:
        """Of one rank."""
        return self.hardware.memory * self.num_gpus

    def step(self, work: Iterable[tuple[int, int]], num_sampled: int) -> StepCost:
        """Returns the cost of a step that computes, for each (computed, new), `new` tokens behind `computed` others.

        E.g. [(500, 1), (0, 300)]: a decode with 500 tokens in the cache, and a prompt of 300 tokens.
        """
        arch, work, tp_size = self.arch, list(work), self.parallel.tensor_parallel_size
        num_tokens = sum(new for _, new in work)
        flops, num_kv_bytes = step_flops(arch, work, num_sampled), kv_bytes(arch, work, self.dtype_bytes)
        kv_parts = min(tp_size, arch.num_key_value_heads)  # with more ranks than KV heads, several hold the same head
        bandwidth = self.hardware.bandwidth * self.num_gpus
        return StepCost(
            flops,
            self.weight_bytes + num_kv_bytes if work else 0.0,
            compute=flops / (self.hardware.flops * self.calibration.compute * self.num_gpus * tp_size),
            memory=(self.weight_bytes / tp_size + num_kv_bytes / kv_parts) / bandwidth if work else 0.0,
            overhead=self.calibration.overhead,
            communication=self.communication(num_tokens, num_sampled) if work else 0.0,
            num_stages=self.parallel.pipeline_parallel_size,
        )

    def communication(self, num_tokens: int, num_sampled: int) -> float:
        """Returns the seconds that a step spends in communication, over all stages."""
        tp_size = self.parallel.tensor_parallel_size
        return sum(
            operation_seconds(self.stage_link if operation == SEND else self.link, operation, tp_size, calls, num_bytes)
            for plan in self._plans
            for (operation, calls), num_bytes in zip(
                plan.calls(num_sampled).items(), plan.bytes(num_tokens, num_sampled).values(), strict=True
            )
        )

    @cached_property
    def _plans(self) -> list[CommunicationPlan]:
        """What the first rank of each stage says to the others."""
        ranks = range(0, self.parallel.world_size, self.parallel.tensor_parallel_size)
        return [CommunicationPlan(self.arch, self.parallel.shard(rank), self.dtype_bytes) for rank in ranks]
