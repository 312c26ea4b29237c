"""How long a step takes on a machine: the larger of computing and reading, and a constant (the roofline model).

Milestone: M5. vLLM counterpart: none. Left out: communication between GPUs, the time of sampling, kernels that get
slower for small batches, and everything that happens outside of a step (tokenizing, HTTP).

    time = max(FLOPs / (peak * compute), bytes / bandwidth) + overhead

Row 1: no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from folovllm.hf_config import ModelArchitecture
from folovllm.sim.hardware import Hardware

COMPUTE, MEMORY, OVERHEAD = "compute", "memory", "overhead"


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


@dataclass(frozen=True)
class StepCost:
    """One step: how much work it is, and how long it takes (seconds)."""

    flops: float
    bytes: float
    compute: float
    memory: float
    overhead: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.overhead

    @property
    def bound(self) -> str:
        """What takes longest: COMPUTE, MEMORY or OVERHEAD."""
        times = {COMPUTE: self.compute, MEMORY: self.memory, OVERHEAD: self.overhead}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class CostModel:
    """A model on `num_gpus` machines that share the work without loss (an ideal tensor parallelism)."""

    arch: ModelArchitecture
    hardware: Hardware
    calibration: Calibration
    num_gpus: int = 1
    dtype_bytes: int = 2  # of activations and of the KV cache
    weight_bits: int = 16

    @property
    def weight_bytes(self) -> float:
        return self.arch.num_parameters() * self.weight_bits / 8

    @property
    def memory(self) -> float:
        return self.hardware.memory * self.num_gpus

    def step(self, work: Iterable[tuple[int, int]], num_sampled: int) -> StepCost:
        """Returns the cost of a step that computes, for each (computed, new), `new` tokens behind `computed` others.

        E.g. [(500, 1), (0, 300)]: a decode with 500 tokens in the cache, and a prompt of 300 tokens.
        """
        arch, work = self.arch, list(work)
        num_tokens = sum(new for _, new in work)
        pairs = sum(new * computed + new * (new + 1) // 2 for computed, new in work)  # (query, key) under the mask
        flops = 2.0 * self._layer_weights * num_tokens
        flops += 2.0 * arch.vocab_size * arch.hidden_size * num_sampled
        flops += 4.0 * arch.num_hidden_layers * arch.q_size * pairs
        kv_tokens = sum(computed + new for computed, new in work)  # K and V are read, and the new ones are written
        read = (self.weight_bytes + arch.kv_bytes_per_token(self.dtype_bytes) * kv_tokens) if work else 0.0
        return StepCost(
            flops,
            read,
            compute=flops / (self.hardware.flops * self.calibration.compute * self.num_gpus),
            memory=read / (self.hardware.bandwidth * self.num_gpus),
            overhead=self.calibration.overhead,
        )

    @property
    def _layer_weights(self) -> int:
        """The weights that every token is multiplied with: all but the embeddings and the head."""
        embeddings = (1 if self.arch.tie_word_embeddings else 2) * self.arch.vocab_size * self.arch.hidden_size
        return self.arch.num_parameters() - embeddings
