"""What each change of M4 should have given a decode step, by arithmetic on what the same run measured.

Milestone: M4. vLLM counterpart: none. No torch. Every prediction takes the step before the change (`before`), the
memory's and the processor's speed beside the arm with it (`now`), and answers milliseconds of the step after it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

LOGITS_PASSES = 3  # a copy in fp32; temperature; softmax. What follows stays in L2

Figures = dict[str, Any]  # one arm at one batch size, from step_profile.py


@dataclass(frozen=True)
class Sizes:
    """What a step has to do, from the config of the model."""

    weight_bytes: int
    num_weights: int
    kv_bytes_per_token: int
    vocab_size: int
    context: int

    def step_bytes(self, batch: int) -> int:
        return self.weight_bytes + self.kv_bytes(batch)

    def kv_bytes(self, batch: int) -> int:
        return batch * self.context * self.kv_bytes_per_token


def linear_floor(now: Figures, sizes: Sizes, batch: int) -> float:
    reading = sizes.weight_bytes / now["bandwidth"]["ordinary"]
    return max(reading, 2 * sizes.num_weights * batch / now["flops"]) * 1e3


def fused(before: Figures, names: Iterable[str]) -> tuple[float, float]:
    """(milliseconds saved in operators, in Python) if each call of these families becomes one operator."""
    families = [before["families"][name] for name in names]
    saved = sum(f["ms"] * (1 - f["calls"] / f["operators"]) for f in families if f["operators"])
    gone = sum(f["operators"] - f["calls"] for f in families)
    return saved, without_operators(before, gone)


def without_operators(before: Figures, number: float) -> float:
    """Milliseconds of Python saved: the time between operators is taken to be spread evenly over them."""
    return float(before["python_ms"] * number / max(before["operators"], 1))


def predict_packing(before: Figures, now: Figures, sizes: Sizes, batch: int) -> float:
    return float(before["step_ms"] - before["families"]["linear"]["ms"] + linear_floor(now, sizes, batch))


def predict_cpp(before: Figures, now: Figures, sizes: Sizes, batch: int) -> float:
    return predict_packing(before, now, sizes, batch) - sum(fused(before, ("norm", "rotary", "silu")))


def predict_paged(before: Figures, now: Figures, sizes: Sizes, batch: int) -> float:
    reading = sizes.kv_bytes(batch) / now["bandwidth"]["ordinary"] * 1e3
    _, python = fused(before, ("attention", "kv_write"))
    return float(before["step_ms"] - before["families"]["attention"]["ms"] + reading - python)


def predict_gated(before: Figures, now: Figures, sizes: Sizes, batch: int) -> float:
    silu = before["families"]["silu"]
    return float(before["step_ms"] - silu["ms"] - without_operators(before, silu["operators"]))


def predict_one_call(before: Figures, now: Figures, sizes: Sizes, batch: int) -> float:
    gone = before["operators_in_layers"] - 1
    return float(before["step_ms"] - without_operators(before, gone))


def predict_huge(before: Figures, now: Figures, sizes: Sizes, batch: int) -> float:
    reading = sum(before["families"][name]["ms"] for name in ("linear", "attention", "layer"))
    return float(before["step_ms"] - reading * (1 - now["bandwidth"]["ordinary"] / now["bandwidth"]["huge"]))


def predict_sampling(before: Figures, now: Figures, sizes: Sizes, batch: int) -> float:
    logits = batch * sizes.vocab_size * 4  # bytes, fp32
    return float(before["step_ms"] + LOGITS_PASSES * logits / now["bandwidth"]["ordinary"] * 1e3)


PREDICTIONS: dict[int, tuple[Callable[[Figures, Figures, Sizes, int], float], str]] = {
    2: (predict_packing, "linears take max(weight bytes / bandwidth, operations / peak), all else stays"),
    3: (predict_cpp, "the same for linears; each norm, rotary and SiLU costs as much as one of its operators did"),
    4: (predict_paged, "attention takes K/V bytes / bandwidth; Python's share shrinks with the number of operators"),
    5: (predict_gated, "SiLU's operators and their part of Python go"),
    6: (predict_one_call, "of Python, the part of all operators in layers but one goes"),
    7: (predict_huge, "linears, attention and layers x bandwidth in 4 KiB pages / bandwidth in huge pages"),
    8: (predict_sampling, f"{LOGITS_PASSES} more passes over the fp32 logits / bandwidth"),
}
