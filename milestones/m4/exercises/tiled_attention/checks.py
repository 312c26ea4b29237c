"""Checks of m4/tiled_attention."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_flash import TorchFlashBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_tokens, with_attributes
from folovllm.learn.exercise import get_exercise

INF, NAN = float("inf"), float("nan")


def prediction() -> str:
    masked = [masked_pairs(TorchFlashBackend, position=5, num_rows=3, first_key=first, tile=4) for first in (0, 4)]
    pairs = ", ".join(f"the query at {query} does not see the key at {key}" for query, key in masked[1])
    return f"{len(masked[0])}, {len(masked[1])}\nAll of keys 0 to 3 is in the past. In the second tile {pairs}."


def backend(
    cls: Any, heads: int = 1, kv_heads: int = 1, size: int = 4, block_kv: int = 4, dtype: torch.dtype = torch.float32
) -> Any:
    made = cls(AttentionSpec(heads, kv_heads, size, dtype, torch.device("cpu"), block_size=4))
    made.BLOCK_Q = made.BLOCK_KV = block_kv
    return made


def masked_pairs(cls: Any, position: int, num_rows: int, first_key: int, tile: int) -> list[tuple[int, int]]:
    """The (position of the query, position of the key) that mask_future masks."""
    scores = torch.zeros(1, num_rows, tile)
    backend(cls).mask_future(scores, first_key, position, num_rows)
    return [(position + row, first_key + column) for _, row, column in scores.isneginf().nonzero().tolist()]


def formula(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, num_rows: int, first: int) -> Any:
    """(out, lse) in fp64, with the whole matrix of scores. `key` and `value` are [keys, kv_heads, size]."""
    scores = q.double() @ key.double().permute(1, 2, 0)  # [kv_heads, group * num_rows, keys]
    rows = position + torch.arange(q.shape[1]) % num_rows  # a query head's rows come one after the other
    scores.masked_fill_(first + torch.arange(key.shape[0]) > rows[:, None], -INF)
    weights = scores.softmax(-1).nan_to_num()
    return weights @ value.double().transpose(0, 1), scores.logsumexp(-1)


def check_against_formula(
    cls: Any,
    num_keys: int,
    position: int,
    num_rows: int,
    first: int = 0,
    kv_heads: int = 2,
    group: int = 1,
    tile: int = 4,
    dtype: torch.dtype = torch.float32,
) -> None:
    generator = torch.Generator().manual_seed(num_keys)
    q = torch.randn(kv_heads, group * num_rows, 4, generator=generator)
    by_slot = torch.full((2, 3 * num_keys + 1, kv_heads, 4), NAN, dtype=dtype)
    slots = torch.randperm(3 * num_keys + 1, generator=generator)[:num_keys]
    by_slot[:, slots] = torch.randn(2, num_keys, kv_heads, 4, generator=generator).to(dtype)
    mine = backend(cls, kv_heads * group, kv_heads, block_kv=tile, dtype=dtype)
    answer = mine.attend_tiles(q, by_slot, slots, position, num_rows, first)
    assert isinstance(answer, tuple) and len(answer) == 2, f"attend_tiles returned {answer}, expected (out, lse)"
    out, lse = answer
    wanted, wanted_lse = formula(q, by_slot[0, slots], by_slot[1, slots], position, num_rows, first)
    case = (
        f"{num_rows} queries at positions {position} to {position + num_rows - 1}, keys {first} to "
        f"{first + num_keys - 1} in tiles of {tile}, {kv_heads} KV heads with {group} query heads each"
    )
    assert out.shape == q.shape and lse.shape == q.shape[:2], (
        f"{case}: out is {list(out.shape)} and lse {list(lse.shape)}, expected {list(q.shape)} and {list(q.shape[:2])}"
    )
    assert out.dtype == lse.dtype == torch.float32, f"{case}: out is {out.dtype} and lse {lse.dtype}, expected fp32"
    assert not out.isnan().any(), (
        f"{case}: the answer has NaN: a slot outside of `slots` was read, where this cache holds NaN, or a row that "
        "sees no key was divided by 0"
    )
    for row in range(q.shape[1]):
        error = (out[:, row] - wanted[:, row]).abs().max().item()
        query = position + row % num_rows
        seen = f"keys {first} to {min(query, first + num_keys - 1)}" if query >= first else "none of these keys"
        assert error < 1e-4, (
            f"{case}: row {row} (position {query}) sees {seen}, and its answer is {error:.3g} away from the formula: "
            "it sees keys of the future, misses some of the past, or meets the wrong values"
        )
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4, msg=f"{case}: lse is not the formula's")


@check("unit", spec="R4.12", hint=1)
def the_mask_by_hand(mine: Mine) -> None:
    """A query sees the keys up to its own position, and no later one."""
    for position, rows, first, wanted in (
        (6, 2, 4, [(6, 7)]),
        (0, 3, 0, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        (9, 1, 8, [(9, 10), (9, 11)]),
        (20, 2, 4, []),
    ):
        found = masked_pairs(mine.cls, position, rows, first, tile=4)
        assert found == wanted, (
            f"queries from position {position} on, {rows} of them, and keys {first} to {first + 3}: the masked pairs "
            f"(query, key) are {found}, expected {wanted}"
            + ("" if found else ". The tensor `scores` itself must change: masked_fill and where return a new one")
        )


@check("unit", spec="R4.12", hint=3)
def every_query_head_gets_the_same_mask(mine: Mine) -> None:
    """The rows of a KV head are those of one query head after the other: [h0 row 0, h0 row 1, h1 row 0, h1 row 1]."""
    scores = torch.zeros(1, 4, 2)
    backend(mine.cls, heads=2).mask_future(scores, 7, 6, 2)
    found = scores.isneginf().int().tolist()[0]
    assert found == [[1, 1], [0, 1], [1, 1], [0, 1]], (
        f"2 query heads, queries at 6 and 7, keys 7 and 8: masked are {found}, expected [[1, 1], [0, 1]] twice"
    )


@check("unit", spec="R4.1", hint=2)
def a_whole_prompt(mine: Mine) -> None:
    """A prompt of 10 tokens in tiles of 4 keys: the last tile is not full."""
    check_against_formula(mine.cls, num_keys=10, position=0, num_rows=10)


@check("unit", spec="R4.1", hint=3)
def a_chunk_behind_a_cached_prefix(mine: Mine) -> None:
    """The new tokens are the last of the sequence: the diagonal ends at the bottom right."""
    check_against_formula(mine.cls, num_keys=9, position=6, num_rows=3)
    check_against_formula(mine.cls, num_keys=9, position=8, num_rows=1)


@check("unit", spec="R4.13", hint=2)
def a_part_of_the_keys(mine: Mine) -> None:
    """With `first_key`, the slots are those of later keys; some queries may see none of them."""
    check_against_formula(mine.cls, num_keys=6, position=3, num_rows=5, first=5)


@check("unit", spec="R4.1", hint=2)
def a_cache_in_bf16(mine: Mine) -> None:
    """The cache is bf16 in most engines. Scores and sums are fp32 all the same: only K and V are rounded."""
    check_against_formula(mine.cls, num_keys=10, position=6, num_rows=4, dtype=torch.bfloat16)


@check("property", spec="R4.1", hint=2)
def random_shapes(mine: Mine) -> None:
    """Any number of queries, keys and heads, and tiles of any size."""
    for seed in range(1, 40):
        generator = torch.Generator().manual_seed(seed)
        rows, cached, group, tile = (int(torch.randint(1, 3 + seed // 2, (1,), generator=generator)) for _ in range(4))
        check_against_formula(mine.cls, cached + rows, cached, rows, kv_heads=1 + seed % 2, group=group, tile=tile)


@check("property", spec="R4.1", hint=2)
def a_batch_of_requests(mine: Mine) -> None:
    """A prompt, a chunk and a decode in one step, through the block table, against torch_naive."""
    answers = []
    for cls in (TorchNaiveBackend, mine.cls):
        generator = torch.Generator().manual_seed(0)
        made = backend(cls, heads=4, kv_heads=2, size=8)
        table = torch.tensor([[5, 2, 0, 0], [3, 9, 1, 0], [4, 6, 7, 8]], dtype=torch.int32)
        cache = torch.full(made.kv_cache_shape(10), NAN)
        for row, length in enumerate((7, 10, 14)):  # everything that the requests have, in their own slots
            slots = torch.tensor([int(table[row, i // 4]) * 4 + i % 4 for i in range(length)])
            made.by_slot(cache)[:, slots] = torch.randn(2, length, 2, 8, generator=generator)
        metadata = AttentionMetadata([0, 7, 10, 11], [7, 10, 14], table, torch.empty(0), 4)
        made.prepare(metadata)
        answers.append(made.forward(torch.randn(11, 4, 8, generator=generator), cache, metadata))
    error = (answers[0] - answers[1]).abs().max().item()
    assert error < 1e-4, f"a prompt of 7, a chunk of 3 behind 7, and a decode at 14: {error} away from torch_naive"


@check("engine", spec="R4.7", hint=3)
def same_tokens_in_small_tiles(mine: Mine) -> None:
    """A real engine, with tiles of 4 queries and 8 keys, generates the tokens of its own loop."""
    with with_attributes(mine.parts, BLOCK_Q=4, BLOCK_KV=8) as parts:
        check_tokens(get_exercise("m4", "tiled_attention"), parts)


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any tensor holds which an operation makes. A view is nothing new."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else (result,)
        for tensor, declared in zip(tensors, func._schema.returns * len(tensors), strict=False):
            if isinstance(tensor, torch.Tensor) and declared.alias_info is None:
                self.numel = max(self.numel, tensor.numel())
        return result


def largest(cls: Any, num_rows: int, num_keys: int) -> int:
    """The largest tensor that attend_tiles makes for the last `num_rows` of `num_keys` tokens, in tiles of 32 keys."""
    mine = backend(cls, size=16, block_kv=32)
    by_slot, q, slots = torch.zeros(2, num_keys, 1, 16), torch.zeros(1, num_rows, 16), torch.arange(num_keys)
    with LargestTensor() as watcher:
        mine.attend_tiles(q, by_slot, slots, num_keys - num_rows, num_rows)
    return watcher.numel


@check("counters", spec="R4.11", hint=1)
def the_score_matrix_is_never_built(mine: Mine) -> None:
    """512 queries on 512 keys: every tensor holds fewer than N * N numbers."""
    found, limit = largest(mine.cls, 512, 512), 512 * 512
    assert found < limit, (
        f"a tensor of {found:,} numbers was made for {512} queries and {512} keys; N * N is {limit:,}: the matrix of "
        "scores was built after all"
    )


@check("counters", spec="R4.11", hint=1)
def the_largest_tensor_does_not_grow(mine: Mine) -> None:
    """The tiles of a long context are as large as those of a short one, so no tensor grows with it."""
    short, long = largest(mine.cls, 8, 256), largest(mine.cls, 8, 1024)
    assert long == short, (
        f"with 256 keys the largest tensor holds {short:,} numbers, with 1,024 keys {long:,}: keys, values or scores "
        "of more than one tile were held at once"
    )
