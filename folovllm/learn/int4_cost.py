"""What 4-bit weights cost in time: a model of SmolLM2-135M's linear layers, beside the committed measurement.

Milestone: M7. vLLM counterpart: none. Left out: attention, sampling, norms and Python, which every arm pays alike.

The model is a roofline: the linear layers take the longer of reading their weights and multiplying with them. Its rates
are those of the reference machine. What unpacking costs is counted in vector instructions, see `multiply_seconds`.
"""

import json
from typing import Any

from folovllm.learn.exercise import milestones_dir
from folovllm.sim.hardware import HARDWARE

CPU = HARDWARE["cpu"]
WEIGHTS = 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536)  # of the 30 decoder layers
HEAD_WEIGHTS = 49_152 * 576  # in bf16 in all arms
BF16, INT4 = 16.0, 4.5  # bits per weight in memory; INT4 with groups of 64, each with a scale in fp32

# Vector instructions for 128 weights, that is, for 4 inputs of 32 outputs.
BF16_PER_ROW = 4 + 4 / 8  # 4 dot products, and 4 loads shared by a tile of 8 rows
INT4_PER_TILE, INT4_TILE_ROWS = 7, 6  # a load, 3 shifts and 3 ands, once for a tile of up to 6 rows
INT4_PER_ROW = 4 + 7 / 16  # 4 dot products, and 7 more for a group of 64 inputs, which is 16 times 128 weights


def linear_ms(bits: float, tokens: int, bandwidth: float = CPU.bandwidth) -> float:
    """Returns the modelled milliseconds of all linear layers in a step of `tokens` tokens."""
    return 1e3 * max(WEIGHTS * bits / 8 / bandwidth, multiply_seconds(bits, tokens))


def multiply_seconds(bits: float, tokens: int) -> float:
    """Returns how long the arithmetic takes. The peak rate is that of bf16, and 4 bits need more instructions."""
    rows = float(tokens)
    if bits == INT4:
        tiles = -(-tokens // INT4_TILE_ROWS)
        rows = (tokens * INT4_PER_ROW + tiles * INT4_PER_TILE) / BF16_PER_ROW
    return 2 * WEIGHTS * rows / CPU.flops


def crossover(bandwidth: float = CPU.bandwidth) -> int:
    """Returns the largest number of tokens for which 4 bits are not slower."""
    return max(n for n in range(1, 100) if linear_ms(INT4, n, bandwidth) <= linear_ms(BF16, n, bandwidth))


def single_ms(bits: float, bandwidth: float = CPU.bandwidth) -> float:
    """Returns the modelled milliseconds of one token: linear layers and head."""
    return linear_ms(bits, 1, bandwidth) + 1e3 * 2 * HEAD_WEIGHTS / bandwidth


def measured() -> dict[str, Any]:
    """Returns milestones/m7/results/bench_gptq.json."""
    result: dict[str, Any] = json.loads((milestones_dir() / "m7/results/bench_gptq.json").read_text(encoding="utf-8"))
    return result


def measured_single_ms(arm: str) -> list[float]:
    """Returns the milliseconds of one token in each repeat of the measurement; `arm` is "bf16" or "memory"."""
    return [1e3 / rate for rate in measured()["arms"][arm]["runs"]["single"]]


def modelled_and_measured() -> list[tuple[str, float, float]]:
    """Returns the rows of page 07b's table: (what, modelled, measured). Measured times are medians of the repeats."""
    arms = measured()["arms"]
    found = [1e3 / arms[name]["single_tokens_per_second"] for name in ("bf16", "memory")]
    slow, fast = single_ms(BF16), single_ms(INT4)
    return [
        ("one token, bf16, ms", slow, found[0]),
        ("one token, 4 bits, ms", fast, found[1]),
        ("saved per token, ms", slow - fast, found[0] - found[1]),
        ("gain for one token", slow / fast, found[0] / found[1]),
        ("gain for 32 tokens", linear_ms(BF16, 32) / linear_ms(INT4, 32), arms["memory"]["batch_ratio"]),
        ("crossover, tokens", crossover(), arms["speed"]["crossover"]),
    ]
