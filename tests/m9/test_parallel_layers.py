"""Layers divided among ranks give what the whole layer gives, and say how much they communicate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from folovllm.distributed.communicator import SINGLE_RANK, Communicator
from folovllm.distributed.thread_communicator import ThreadGroup, run_ranks
from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.cpu.int4_kernel import int4_refusal
from folovllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from folovllm.model_executor.layers.quantization.gptq import GPTQQuantization
from folovllm.model_executor.layers.quantization.kernels import KernelOptions
from folovllm.model_executor.layers.vocab_embedding import ParallelLMHead, VocabParallelEmbedding
from tests.m7.quant_helpers import random_layer

pytestmark = pytest.mark.m9

INPUTS, OUTPUTS, VOCAB = 12, 8, 10


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(layer: LinearBase, tensors: dict[str, torch.Tensor], shard_id: Any = None) -> None:
    for name, tensor in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, tensor, shard_id)


def with_ranks(
    size: int, work: Callable[[Communicator], torch.Tensor]
) -> tuple[list[torch.Tensor], list[dict[str, int]]]:
    """The results of all ranks, and how often each rank called what."""

    def counted(tp: Communicator) -> tuple[torch.Tensor, dict[str, int]]:
        return work(tp), tp.counts.calls

    results, calls = zip(*run_ranks(size, counted), strict=True)
    return list(results), list(calls)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_row_parallel_adds_the_bias_once(size: int, bias: bool) -> None:
    tensors = {"weight": randn(OUTPUTS, INPUTS)} | ({"bias": randn(OUTPUTS, seed=1)} if bias else {})
    x = randn(5, INPUTS, seed=2)

    def work(tp: Communicator) -> torch.Tensor:
        layer = RowParallelLinear(INPUTS, OUTPUTS, bias, tp=tp)
        load(layer, tensors)
        return layer(x.chunk(size, dim=1)[tp.rank])

    results, calls = with_ranks(size, work)
    torch.testing.assert_close(results[0], F.linear(x, tensors["weight"], tensors.get("bias")))
    assert all(torch.equal(result, results[0]) for result in results)
    assert calls == [{"all_reduce": 1}] * size


@pytest.mark.parametrize("size", [2, 4])
def test_column_parallel_outputs_in_the_order_of_the_ranks_are_the_whole(size: int) -> None:
    weight, bias, x = randn(OUTPUTS, INPUTS), randn(OUTPUTS, seed=1), randn(5, INPUTS, seed=2)

    def work(tp: Communicator) -> torch.Tensor:
        layer = ColumnParallelLinear(INPUTS, OUTPUTS, bias=True, tp=tp)
        load(layer, {"weight": weight, "bias": bias})
        return layer(x)

    results, calls = with_ranks(size, work)
    torch.testing.assert_close(torch.cat(results, dim=1), F.linear(x, weight, bias))
    assert calls == [{}] * size


def test_merged_and_qkv_parts_are_divided_one_by_one() -> None:
    """With 4 ranks and 2 KV heads, ranks 0 and 1 hold head 0, ranks 2 and 3 head 1."""
    gate, up = randn(OUTPUTS, INPUTS), randn(OUTPUTS, INPUTS, seed=1)
    q, k, v = (randn(heads * 3, INPUTS, seed=seed) for heads, seed in ((4, 2), (2, 3), (2, 4)))
    x = randn(5, INPUTS, seed=5)

    def work(tp: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        merged = MergedColumnParallelLinear(INPUTS, [OUTPUTS, OUTPUTS], tp=tp)
        load(merged, {"weight": gate}, 0)
        load(merged, {"weight": up}, 1)
        qkv = QKVParallelLinear(INPUTS, 3, 4, 2, tp=tp)
        for shard_id, tensor in (("q", q), ("k", k), ("v", v)):
            load(qkv, {"weight": tensor}, shard_id)
        assert (qkv.num_heads, qkv.num_kv_heads) == (1, 1)
        return merged(x), qkv(x)

    for rank, (merged, qkv) in enumerate(run_ranks(4, work)):
        own = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(merged, torch.cat([F.linear(x, gate[own]), F.linear(x, up[own])], dim=1))
        head, kv = slice(3 * rank, 3 * rank + 3), slice(3 * (rank // 2), 3 * (rank // 2) + 3)
        torch.testing.assert_close(qkv, torch.cat([F.linear(x, w) for w in (q[head], k[kv], v[kv])], dim=1))


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_embedding_and_head_over_a_vocabulary_that_need_not_divide(size: int) -> None:
    table, ids, hidden = randn(VOCAB, 6), torch.tensor([0, 9, 4, 5, 9, 3]), randn(3, 6, seed=1)

    def work(tp: Communicator) -> torch.Tensor:
        embedding, head = VocabParallelEmbedding(VOCAB, 6, tp=tp), ParallelLMHead(6, VOCAB, tp=tp)
        embedding.weight_loader(embedding.weight, table)
        head.tie_weights(embedding)
        logits = head(hidden)
        assert logits.shape == (3, VOCAB) and logits.is_contiguous()
        torch.testing.assert_close(logits, F.linear(hidden, table))
        return embedding(ids)

    results, calls = with_ranks(size, work)
    assert all(torch.equal(result, table[ids]) for result in results)
    assert torch.equal(ids, torch.tensor([0, 9, 4, 5, 9, 3])), "the runner's buffer stays as it is"
    assert calls == [{"all_gather": 1, "all_reduce": 1}] * size


# --- GPTQ: the inputs of a row-parallel layer are divided, and its groups with them ---------------------------------

ROWS = 128  # inputs
CONFIGS = {
    "groups divide": GPTQConfig(4, 32, sym=False),
    "a group is cut": GPTQConfig(4, 48, sym=False),  # 128 = 48 + 48 + 32
    "act-order": GPTQConfig(4, 32, sym=False, desc_act=True),
    "one group": GPTQConfig(8, -1, sym=False),
    "3 bits": GPTQConfig(3, 40, sym=False, desc_act=True),
    "2 bits": GPTQConfig(2, 64, desc_act=True),
}


@pytest.mark.parametrize("kernel", ["dequant", "cpu_int4"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_row_parallel_gptq_holds_the_groups_that_its_inputs_use(config: GPTQConfig, size: int, kernel: str) -> None:
    """Its weight is exactly the rank's columns of the whole dequantised weight."""
    if kernel == "cpu_int4" and int4_refusal(config, KernelOptions()) is not None:
        pytest.skip("cpu_int4 cannot run this here")
    linear = random_layer(config, ROWS, 64)
    bias, x = randn(64, seed=1), randn(3, ROWS, seed=2)

    def work(tp: Communicator) -> torch.Tensor:
        layer = RowParallelLinear(ROWS, 64, True, quant_config=GPTQQuantization(config, kernel), prefix="x", tp=tp)
        load(layer, linear.pack(config) | {"bias": bias})
        layer.quant_method.process_weights_after_loading(layer)
        if kernel == "dequant":
            (part,) = layer.quant_method.kernel.layer_parts(layer)  # type: ignore[attr-defined]
            columns = slice(tp.rank * ROWS // size, (tp.rank + 1) * ROWS // size)
            assert torch.equal(part.dequantize(), linear.dequantize()[:, columns])
            used = linear.g_idx[columns].unique()
            assert len(part.scales) == len(part.zeros) == len(used)
        return layer(x.chunk(size, dim=1)[tp.rank].contiguous())

    results, calls = with_ranks(size, work)
    expected = F.linear(x, linear.dequantize(), bias)
    # cpu_int4 rounds x to 8 bits per group where the CPU multiplies bytes.
    tolerance = 1e-4 if kernel == "dequant" else 0.02 * float(expected.abs().max())
    torch.testing.assert_close(results[0], expected, atol=tolerance, rtol=1e-4)
    assert calls == [{"all_reduce": 1}] * size


def test_the_weights_of_all_ranks_are_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in bf16 are kept if there is memory for all of them, and the ranks of a CPU share it."""
    quantization, planned = GPTQQuantization(GPTQConfig(4, 32)), []
    monkeypatch.setattr(quantization.kernel, "plan", planned.append)
    layer = ColumnParallelLinear(64, 32, quant_config=quantization, prefix="x", tp=ThreadGroup(4).communicator(0))
    quantization.plan(layer, num_ranks=4)
    quantization.plan(layer)
    assert planned == [64 * 32, 64 * 8]


def test_a_quantised_head_is_divided() -> None:
    config = GPTQConfig(4, 32, sym=False, lm_head=True)
    linear, x = random_layer(config, 32, 64), randn(3, 32)

    def work(tp: Communicator) -> torch.Tensor:
        head = ParallelLMHead(32, 64, quant_config=GPTQQuantization(config), prefix="lm_head", tp=tp)
        load(head, linear.pack(config))
        assert head.qweight.shape == (4, 64 // tp.size)
        return head(x)

    for size in (2, 4):
        for logits in run_ranks(size, work):
            torch.testing.assert_close(logits, F.linear(x, linear.dequantize()))


def test_one_rank_calls_nothing() -> None:
    for layer in (RowParallelLinear(INPUTS, OUTPUTS), ColumnParallelLinear(INPUTS, OUTPUTS)):
        assert layer.tp is SINGLE_RANK and layer(randn(2, INPUTS)).shape == (2, OUTPUTS)
    assert SINGLE_RANK.counts.calls == {}
