"""The plan of what ranks say to each other, by hand. test_parallel_parity.py compares it with what a model counts."""

import pytest

from folovllm.communication_plan import ALL_GATHER, ALL_REDUCE, SEND, CommunicationPlan, ring_bytes
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ModelShard

pytestmark = pytest.mark.m9

ARCH = shape_architecture("smollm2-135m")  # 30 layers, hidden 576, vocabulary 49,152


def test_calls_of_a_pass() -> None:
    """Two all-reduces per layer and the embedding's, on the stage that has them; the logits are gathered at the end."""
    assert CommunicationPlan(ARCH).calls(4) == {}
    assert CommunicationPlan(ARCH, ModelShard(0, 3)).calls(4) == {ALL_REDUCE: 61, ALL_GATHER: 1}
    assert CommunicationPlan(ARCH, ModelShard(0, 3)).calls(0) == {ALL_REDUCE: 61}, "nothing is sampled"
    stages = [CommunicationPlan(ARCH, ModelShard(0, 3, stage, 2)).calls(1) for stage in range(2)]
    assert stages == [{ALL_REDUCE: 31, SEND: 2}, {ALL_REDUCE: 30, ALL_GATHER: 1}]
    assert [CommunicationPlan(ARCH, ModelShard(0, 1, stage, 2)).calls(1) for stage in range(2)] == [{SEND: 2}, {}]


def test_bytes_of_a_pass() -> None:
    plan = CommunicationPlan(ARCH, ModelShard(0, 3))
    assert plan.bytes(4, 4) == {ALL_REDUCE: 61 * 4 * 576 * 2, ALL_GATHER: 4 * 16_384 * 2}
    padded = CommunicationPlan(ARCH, ModelShard(0, 9), dtype_bytes=4).bytes(1, 1)
    assert padded[ALL_GATHER] == 5_462 * 4, "49,152 / 9 is rounded up"
    assert CommunicationPlan(ARCH, ModelShard(pp_size=2)).bytes(5, 1) == {SEND: 2 * 5 * 576 * 2}


def test_what_a_ring_sends() -> None:
    """By turns: n - 1 turns with a piece each to add up, and for an all-reduce as many again to tell the sum."""
    for size in (2, 3, 8):
        piece = 24 / size
        assert ring_bytes(ALL_REDUCE, 24, size) == pytest.approx(2 * (size - 1) * piece)
        assert ring_bytes(ALL_GATHER, 24, size) == (size - 1) * 24
    assert ring_bytes(SEND, 24, 2) == 24
    assert ring_bytes(ALL_REDUCE, 1_200, 3) == pytest.approx(1_600)
