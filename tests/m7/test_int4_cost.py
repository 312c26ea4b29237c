"""folovllm/learn/int4_cost.py and the tables of page 07b (milestone M7)."""

import json

import pytest

from folovllm.learn import int4_cost
from scripts.dev.fill_results import ROOT, fill, ratios

pytestmark = pytest.mark.m7


def test_model_by_hand() -> None:
    """One token waits for memory; 64 tokens wait for arithmetic, of which 4 bits need more."""
    weights, cpu = int4_cost.WEIGHTS, int4_cost.CPU
    assert weights == 106_168_320
    assert int4_cost.linear_ms(int4_cost.BF16, 1) == pytest.approx(1e3 * 2 * weights / cpu.bandwidth)
    assert int4_cost.linear_ms(int4_cost.INT4, 1) == pytest.approx(1e3 * weights * 4.5 / 8 / cpu.bandwidth)
    assert int4_cost.linear_ms(int4_cost.BF16, 60) == pytest.approx(1e3 * 2 * weights * 60 / cpu.flops)
    full_tiles = (7 / 6 + 4 + 7 / 16) / (4 / 8 + 4)
    assert int4_cost.multiply_seconds(int4_cost.INT4, 60) == pytest.approx(
        full_tiles * int4_cost.multiply_seconds(int4_cost.BF16, 60)
    )


def test_faster_memory_lowers_the_crossover() -> None:
    bandwidth = int4_cost.CPU.bandwidth
    found = [int4_cost.crossover(factor * bandwidth) for factor in (0.5, 1, 2)]
    assert found == sorted(found, reverse=True) and found[0] > found[2]


def test_ratios_are_ranges_over_the_repeats() -> None:
    """The median of each arm hides that the machine changed during the run (public report: learn/07b, 1.84 times)."""
    arms = {"bf16": {"runs": {"single": [10.0, 20.0], "batch": [100.0, 100.0]}},
            "memory": {"runs": {"single": [20.0, 30.0], "batch": [79.0, 86.0]}}}  # fmt: skip
    assert ratios({"arms": arms}, "memory", "single") == "1.5x to 2.0x"
    assert ratios({"arms": arms}, "memory", "batch") == "0.79x to 0.86x"
    assert ratios({"arms": arms}, "bf16", "batch") == "1"


@pytest.mark.parametrize("columns,said", [("bits,ratio", False), ("bits,ratio,seconds", True)])
def test_a_table_without_times_claims_none(columns: str, said: bool) -> None:
    text = f"<!-- results: milestones/m7/results/quantize.json columns={columns} -->\n<!-- /results -->"
    assert ("times in seconds" in fill(text, ROOT / "docs")) == said


def test_measured_is_the_result_file() -> None:
    file = ROOT / "milestones/m7/results/bench_gptq.json"
    assert int4_cost.measured() == json.loads(file.read_text(encoding="utf-8"))
