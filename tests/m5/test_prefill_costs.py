"""What pages 05 and 06 print about the cost of a prompt: the two models by hand, and the chunks of the measured run."""

import json
from pathlib import Path

import pytest

from folovllm.learn.prefill_costs import attention_flops, attention_rate, calibrated, modelled, roofline
from folovllm.sim.cost import CALIBRATIONS
from folovllm.sim.hardware import HARDWARE

pytestmark = pytest.mark.m5

MEASURED = Path(__file__).parents[2] / "milestones/m5/results/long_prompts_cpu.json"
WIDTH, LAYERS = 576, 30  # of SmolLM2-135M


def test_attention_has_four_operations_for_each_pair() -> None:
    """A query of 3 new tokens behind 2 others attends to 3, 4 and 5 keys; it is multiplied with keys, then values."""
    assert attention_flops([(2, 3)]) == 4 * (3 + 4 + 5) * WIDTH * LAYERS
    assert attention_flops([(0, 1), (5, 1)]) == 4 * (1 + 6) * WIDTH * LAYERS


def test_the_calibrated_model_is_a_sum() -> None:
    """Products at their rate, attention at its own, and a constant."""
    prompt = [(0, 4000)]
    cost, fast = calibrated().step(prompt, num_sampled=1), CALIBRATIONS["cpu", "fast"]
    attention = attention_flops(prompt)
    products = (cost.flops - attention) / (HARDWARE["cpu"].flops * fast.compute)
    assert cost.seconds == pytest.approx(products + attention / attention_rate() + fast.overhead)
    assert cost.flops == roofline().step(prompt, num_sampled=1).flops
    assert cost.seconds > roofline().step(prompt, num_sampled=1).seconds


def test_a_budget_cuts_the_prompt_as_it_was_measured() -> None:
    """256 tokens less 8 decodes are 16 chunks of 248 and one of 32. The measured run has as many long gaps."""
    gaps = json.loads(MEASURED.read_text())["arms"]["m5+budget=256"]["modes"]["batch"]["groups"]["decoding"]["gaps"]
    chunks = modelled(256).chunks
    assert len(chunks) == -(-4000 // 248) == 17
    assert chunks[:16] == sorted(chunks[:16]), "each chunk attends to more tokens than the one before"
    assert sum(ms > 100 for _, ms in gaps) == 4 * 16, "four prompts, and the last chunk is short"
    assert len(modelled(None).chunks) == 1
