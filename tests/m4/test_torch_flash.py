"""torch_flash by itself: that it never holds a whole score matrix, that split-KV merges, and its worked example.

Milestone: M4 (R4.11 to R4.14). That its answers are right is shown in test_backends.py.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends import torch_flash
from folovllm.attention.backends.torch_flash import TorchFlashBackend, group_queries, ungroup_queries
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from tests.m4.conformance import Batch, make_batch, run

pytestmark = pytest.mark.m4

INF = float("inf")
# The arithmetic of its methods does not depend on the spec.
BACKEND = TorchFlashBackend(AttentionSpec(1, 1, 1, torch.float32, torch.device("cpu"), block_size=1))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements any operator's new tensor had, and how many scores were made. Views are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.num_scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else (result,)
        for tensor, declared in zip(tensors, func._schema.returns * len(tensors), strict=False):
            if isinstance(tensor, torch.Tensor) and declared.alias_info is None:
                self.numel = max(self.numel, tensor.numel())
        if func is torch.ops.aten.bmm.default:  # in torch_flash the scores; the other product is a baddbmm
            self.num_scores += result.numel()
        return result


def watch(backend_class: type[TorchNaiveBackend], batch: Batch) -> LargestTensor:
    """What `forward` makes; writing K and V into the cache is not counted."""
    backend = backend_class(batch.spec)
    with pytest.MonkeyPatch.context() as patch:
        watcher, forward = LargestTensor(), backend.forward

        def watched(*args: Any) -> torch.Tensor:
            with watcher:
                return forward(*args)

        patch.setattr(backend, "forward", watched)
        run(backend, batch)
    return watcher


# --- no N x N tensor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [1, 3])
def test_it_never_builds_a_score_matrix(num_heads: int) -> None:
    """1,024 queries on 1,024 keys. Naive holds at least N^2 scores; flash less in any tensor it makes."""
    n = 1024
    batch = make_batch(np.random.default_rng(0), [("prefill", 0, n)], group=num_heads)
    naive, flash = watch(TorchNaiveBackend, batch), watch(TorchFlashBackend, batch)
    print(f"{num_heads} heads: largest tensor {naive.numel} (naive), {flash.numel} (flash), N^2 is {n * n}")
    assert naive.numel >= num_heads * n * n
    assert flash.numel < n * n


def test_its_largest_tensor_does_not_grow_with_the_context() -> None:
    """A chunk of 200 tokens at the end of 1,000 and of 4,000: K, V and scores come in tiles of one size."""
    sizes = [
        watch(TorchFlashBackend, make_batch(np.random.default_rng(0), [("chunk", length - 200, 200)])).numel
        for length in (1000, 4000)
    ]
    assert sizes[0] == sizes[1]


def test_tiles_in_the_future_are_never_computed() -> None:
    """Of a prompt of 4 x BLOCK_KV tokens about half of the score tiles lie behind the diagonal."""
    n = 4 * TorchFlashBackend.BLOCK_KV
    scores = watch(TorchFlashBackend, make_batch(np.random.default_rng(0), [("prefill", 0, n)], group=1)).num_scores
    # Each query tile reaches to its own last query, exactly: BLOCK_Q, 2 BLOCK_Q, ... keys.
    size = TorchFlashBackend.BLOCK_Q
    tiles = n // size
    assert scores == size * size * tiles * (tiles + 1) // 2
    assert scores < 0.6 * n * n


@pytest.mark.parametrize("block_q", [1, 5, 64])
@pytest.mark.parametrize("block_kv", [1, 7, 64])
def test_any_tile_size_gives_the_same_answer(block_q: int, block_kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(np.random.default_rng(1), [("prefill", 0, 33), ("chunk", 20, 11), ("decode", 40, 1)], group=3)
    expected = run(TorchFlashBackend(batch.spec), batch)
    monkeypatch.setattr(TorchFlashBackend, "BLOCK_Q", block_q)
    monkeypatch.setattr(TorchFlashBackend, "BLOCK_KV", block_kv)
    torch.testing.assert_close(run(TorchFlashBackend(batch.spec), batch), expected, rtol=0, atol=1e-5)


# --- the arithmetic, by hand ------------------------------------------------------------------------------------------


def attend(scores: list[float], values: list[float], position: int = 10**6) -> tuple[float, float]:
    """One query of head size 1 with query 1, so that a key is its score."""
    by_slot = torch.tensor([scores, values]).view(2, -1, 1, 1)  # [2, num_slots, 1, 1]
    out, lse = BACKEND.attend_tiles(torch.ones(1, 1, 1), by_slot, torch.arange(len(scores)), position, num_rows=1)
    return out.item(), lse.item()


def test_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores [1, 3] then [5]: the numbers in the head of torch_flash.py."""
    monkeypatch.setattr(TorchFlashBackend, "BLOCK_KV", 2)
    out, lse = attend([1.0, 3.0, 5.0], [10.0, 20.0, 30.0])
    assert out == pytest.approx(28.509, abs=5e-4)
    assert lse == pytest.approx(5 + np.log(1.154), abs=5e-4)
    text = torch_flash.__doc__ or ""
    first, second = np.exp(-2) + 1, (np.exp(-2) + 1) * np.exp(-2) + 1
    for number in (first, second, 10 * np.exp(-2) + 20, (10 * np.exp(-2) + 20) * np.exp(-2) + 30, out):
        assert f"{number:.3f}" in text


def test_nothing_seen_is_zero_with_no_weight() -> None:
    assert attend([1.0, 2.0], [3.0, 4.0], position=-1) == (0.0, -INF)
    assert attend([], []) == (0.0, -INF)


def test_grouping_puts_the_heads_of_a_kv_head_together() -> None:
    query = torch.tensor([[[1], [2], [3], [4]], [[5], [6], [7], [8]]])  # [2 rows, 4 heads, 1]
    grouped = group_queries(query, num_kv_heads=2)
    assert grouped.squeeze(-1).tolist() == [[1, 5, 2, 6], [3, 7, 4, 8]]
    assert torch.equal(ungroup_queries(grouped, num_rows=2), query)


# --- split-KV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("cuts", [[], [1], [10, 20], [0, 0, 299], [100, 200, 300], list(range(1, 300))])
def test_parts_merge_into_the_whole(cuts: list[int], scale: float) -> None:
    """Any cuts of 300 keys, empty parts and single keys among them; twice merged is merged."""
    generator = torch.Generator().manual_seed(0)
    by_slot = torch.randn(2, 300, 2, 16, generator=generator)
    q = torch.randn(2, 3, 16, generator=generator) * scale  # one decode token: 3 query heads on each of 2 KV heads
    slots = torch.randperm(300, generator=generator)
    whole = BACKEND.attend_tiles(q, by_slot, slots, position=299, num_rows=1)
    edges = [0, *cuts, 300]
    parts = [
        BACKEND.attend_tiles(q, by_slot, slots[a:b], position=299, num_rows=1, first_key=a)
        for a, b in itertools.pairwise(edges)
    ]
    merged = BACKEND.merge_partials(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
    half = len(parts) // 2
    if half:
        again = [BACKEND.merge_partials(*zip(*some, strict=True)) for some in (parts[:half], parts[half:])]
        torch.testing.assert_close(BACKEND.merge_partials(*zip(*again, strict=True)), whole, rtol=1e-5, atol=1e-5)


def test_a_causal_chunk_can_be_split_too() -> None:
    """The first queries of a chunk see nothing of the last part."""
    generator = torch.Generator().manual_seed(1)
    by_slot, q = torch.randn(2, 50, 1, 8, generator=generator), torch.randn(1, 20, 8, generator=generator)
    slots = torch.randperm(50, generator=generator)
    whole = BACKEND.attend_tiles(q, by_slot, slots, position=30, num_rows=20)
    edges = [0, 25, 40, 50]
    parts = [
        BACKEND.attend_tiles(q, by_slot, slots[a:b], position=30, num_rows=20, first_key=a)
        for a, b in itertools.pairwise(edges)
    ]
    assert parts[2][1].isneginf().sum() == 10, "queries 30 .. 39 see none of keys 40 .. 49"
    torch.testing.assert_close(BACKEND.merge_partials(*zip(*parts, strict=True)), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_splits", [2, 3, 7, 1000])
def test_any_number_of_splits_gives_the_same_answer(num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole backend with its keys cut: prompts and chunks, whose first queries see nothing of the last parts, and a
    decode. With 1,000 splits every key is a part of its own.
    """
    batch = make_batch(np.random.default_rng(2), [("prefill", 0, 33), ("chunk", 20, 11), ("decode", 40, 1)], group=3)
    expected = run(TorchFlashBackend(batch.spec), batch)
    merged: list[int] = []

    def counted(self: TorchFlashBackend, outs: Any, lses: Any) -> Any:
        merged.append(len(outs))
        return merge(self, outs, lses)

    merge = TorchFlashBackend.merge_partials
    monkeypatch.setattr(TorchFlashBackend, "NUM_SPLITS", num_splits)
    monkeypatch.setattr(TorchFlashBackend, "merge_partials", counted)
    torch.testing.assert_close(run(TorchFlashBackend(batch.spec), batch), expected, rtol=0, atol=1e-5)
    assert sorted(merged) == [min(num_splits, seq_len) for seq_len in (31, 33, 41)], (
        "each query tile merges its parts once"
    )


def test_merging_by_hand() -> None:
    """Weights 1 and 3: a quarter of one, three quarters of the other. A part that saw nothing does not count."""
    outs = [torch.tensor([[8.0]]), torch.tensor([[4.0]]), torch.tensor([[0.0]])]
    lses = [torch.tensor([np.log(1.0)]), torch.tensor([np.log(3.0)]), torch.tensor([-INF])]
    out, lse = BACKEND.merge_partials(outs, lses)
    assert out.item() == pytest.approx(5.0) and lse.item() == pytest.approx(np.log(4.0))
    nothing, no_weight = BACKEND.merge_partials([torch.zeros(1, 1)] * 2, [torch.tensor([-INF])] * 2)
    assert nothing.item() == 0.0 and no_weight.item() == -INF
