"""The checks of m3/paged_gather: a cache whose other slots are NaN, and attention on dense tensors to compare with."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.learn.check import Mine, check

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, NUM_BLOCKS = 4, 2, 8, 24


def prediction() -> str:
    """Asks the reference what it prepares for the request of `predict`."""
    metadata = AttentionMetadata.single_sequence(6, [7, 2], block_size=4, num_computed_tokens=4)
    TorchNaiveBackend(make_spec(4)).prepare(metadata)
    ((slots, mask),) = metadata.prepared
    return f"slots {slots.tolist()}; the mask hides {int(mask.sum())}\nThe mask has {mask.numel()} scores in all."


def make_spec(block_size: int, dtype: torch.dtype = torch.float32) -> AttentionSpec:
    return AttentionSpec(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, dtype, torch.device("cpu"), block_size)


@dataclass
class Step:
    """One step: queries, a cache that is NaN wherever no request of the step has a token, and the right answer."""

    query: torch.Tensor  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor  # [2, num_blocks, block_size, num_kv_heads, head_size]
    metadata: AttentionMetadata
    expected: torch.Tensor  # [num_tokens, num_heads, head_size]

    def run(self, cls: Any) -> torch.Tensor:
        backend = cls(make_spec(self.metadata.block_size))
        backend.prepare(self.metadata)
        return backend.forward(self.query, self.kv_cache, self.metadata)

    def explain(self, i: int) -> str:
        starts, seq_len, size = self.metadata.query_start_loc, self.metadata.seq_lens[i], self.metadata.block_size
        blocks = self.metadata.block_table[i, : -(-seq_len // size)].tolist()
        return f"request {i} ({starts[i + 1] - starts[i]} of {seq_len} tokens are new, in blocks {blocks} of {size})"


def make_step(
    lengths: list[tuple[int, int]], block_size: int = 4, seed: int = 0, tables: list[list[int]] | None = None
) -> Step:
    """Returns a step of requests given as (new tokens, sequence length), in blocks in any order, or as `tables` say."""
    torch.manual_seed(seed)
    free = random.Random(seed).sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
    kv_cache = torch.full((2, NUM_BLOCKS, block_size, NUM_KV_HEADS, HEAD_SIZE), float("nan"))
    queries, answers, held = [], [], []
    for i, (q_len, seq_len) in enumerate(lengths):
        table = tables[i] if tables else [free.pop() for _ in range(-(-seq_len // block_size))]
        kv = torch.randn(2, seq_len, NUM_KV_HEADS, HEAD_SIZE)  # [2, seq_len, num_kv_heads, head_size]
        for position in range(seq_len):
            kv_cache[:, table[position // block_size], position % block_size] = kv[:, position]
        query = torch.randn(q_len, NUM_HEADS, HEAD_SIZE)  # [q_len, num_heads, head_size]
        queries.append(query)
        answers.append(attention(query, *kv))
        held.append(table)
    width = max(map(len, held)) + 1  # like the worker's table: wider than needed, padded with the null block
    block_table = torch.tensor([table + [0] * (width - len(table)) for table in held], dtype=torch.int32)
    starts = [sum(q_len for q_len, _ in lengths[:i]) for i in range(len(lengths) + 1)]
    metadata = AttentionMetadata(
        starts, [seq_len for _, seq_len in lengths], block_table, torch.empty(0, dtype=torch.int64), block_size
    )
    return Step(torch.cat(queries), kv_cache, metadata, torch.cat(answers))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns attention of one request on dense tensors, one query after the other."""
    q_len, seq_len, group = len(query), len(key), NUM_HEADS // NUM_KV_HEADS
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)  # [seq_len, num_heads, ...]
    output = torch.empty_like(query)  # [q_len, num_heads, head_size]
    for i in range(q_len):
        last = seq_len - q_len + i + 1  # query i sees the keys before this position
        scores = (key[:last] * query[i]).sum(dim=-1) * HEAD_SIZE**-0.5  # [last, num_heads]
        output[i] = (scores.softmax(dim=0)[:, :, None] * value[:last]).sum(dim=0)
    return output


def compare(step: Step, cls: Any, why: str) -> None:
    got = step.run(cls)
    assert got.shape == step.query.shape, f"the output is {list(got.shape)}, expected {list(step.query.shape)}"
    for i, seq_len in enumerate(step.metadata.seq_lens):
        rows = slice(step.metadata.query_start_loc[i], step.metadata.query_start_loc[i + 1])
        assert not got[rows].isnan().any(), (
            f"the output of {step.explain(i)} is NaN: a slot was read that is not one of its {seq_len}. {why}"
        )
        error = (got[rows] - step.expected[rows]).abs().max().item()
        assert error < 1e-4, f"the output of {step.explain(i)} is off by {error:.2g}. {why}"


@check("unit", spec="R3.14", hint=1)
def one_new_token_sees_its_whole_sequence(mine: Mine) -> None:
    """In a decode step the query is one token, and the keys are all tokens of the sequence, from the cache."""
    for seq_len in (4, 8):
        step = make_step([(1, seq_len)], tables=[[1, 2]])
        compare(step, mine.cls, f"The {seq_len - 1} tokens before the new one are in the cache, and it sees them all.")


@check("unit", spec="R3.14", hint=2)
def a_whole_prompt(mine: Mine) -> None:
    """If all tokens are new, each query sees itself and the tokens before it."""
    compare(make_step([(8, 8)], tables=[[1, 2]]), mine.cls, "Query i sees the keys 0 to i, and no later one.")


@check("unit", spec="R3.14", hint=3)
def new_tokens_behind_cached_ones(mine: Mine) -> None:
    """If the queries are fewer than the keys, they are the last positions: the mask is aligned at the end."""
    compare(
        make_step([(4, 8)], tables=[[1, 2]]),
        mine.cls,
        "Query i is at position seq_len - q_len + i, and sees the keys up to there.",
    )


@check("unit", spec="R3.16", hint=2)
def physical_blocks_mean_nothing(mine: Mine) -> None:
    """The same tokens in other blocks give the same answer, to the last bit."""
    answers = []
    for tables in ([[1, 2, 3]], [[3, 1, 2]], [[20, 9, 14]]):
        answers.append(make_step([(2, 12)], tables=tables).run(mine.cls))
        assert torch.equal(answers[0], answers[-1]), (
            f"12 tokens in the blocks [1, 2, 3] and in {tables[0]} of 4 give different answers: logical block j of a "
            "sequence is in the physical block block_table[i, j], wherever that is"
        )


@check("unit", spec="R3.15", hint=3)
def unowned_slots_never_leak(mine: Mine) -> None:
    """Slots that hold no token of the sequence are NaN: the end of the last block, free blocks, the null block."""
    for seq_len in (1, 5, 7, 8, 9):
        compare(
            make_step([(1, seq_len)]), mine.cls, "The end of the last block holds what an earlier request has left."
        )


@check("unit", spec="R3.15", hint=1)
def each_request_reads_its_own(mine: Mine) -> None:
    """A step mixes whole prompts, chunks and single tokens. Each request reads its own row of the table."""
    step = make_step([(3, 3), (1, 10), (2, 6), (1, 1)])
    compare(step, mine.cls, "Its rows are query_start_loc[i] to query_start_loc[i + 1]; its blocks are block_table[i].")


@check("unit", spec="R3.18", hint=2)
def two_requests_may_share_a_block(mine: Mine) -> None:
    """With prefix caching (M6) two tables name one block. Both requests read it, as if each had it alone."""
    shared = make_step([(1, 6), (1, 7)], tables=[[5, 8], [5, 9]])
    alone = Step(shared.query[:1], shared.kv_cache, row(shared.metadata, 0), shared.expected[:1])
    difference = (shared.run(mine.cls)[:1] - alone.run(mine.cls)).abs().max().item()
    assert difference < 1e-5, (
        f"blocks [5, 8] and [5, 9]: the first request alone gives another answer, by {difference:.2g}"
    )


def row(metadata: AttentionMetadata, i: int) -> AttentionMetadata:
    """Returns the metadata of a step with request i alone, which has one new token."""
    return AttentionMetadata(
        [0, 1], [metadata.seq_lens[i]], metadata.block_table[i : i + 1], metadata.slot_mapping, metadata.block_size
    )


@check("unit", spec="R3.14", hint=2)
def a_cache_in_bf16(mine: Mine) -> None:
    """Real models keep K and V in bf16: they are made float32 for `_attend`, and the output is bf16 again."""
    step = make_step([(2, 6), (1, 5)])
    backend = mine.cls(make_spec(4, torch.bfloat16))
    backend.prepare(step.metadata)
    try:
        got = backend.forward(step.query.bfloat16(), step.kv_cache.bfloat16(), step.metadata)
    except RuntimeError as error:
        raise AssertionError(
            f"with a bf16 cache forward raised '{error}': self._attend wants K and V in float32"
        ) from None
    assert got.dtype == torch.bfloat16, f"the queries are bf16 and the output is {got.dtype}, expected bf16"
    error = (got.float() - step.expected).abs().max().item()
    assert error < 0.05, f"with a bf16 cache the output is off by {error:.2g}, and rounding explains less than 0.05"


@check("property", spec="R3.15", hint=1)
def any_mixed_batch(mine: Mine) -> None:
    """Random batches in blocks of 1 to 6, small ones first, against attention on dense tensors."""
    for seed in range(40):
        rng = random.Random(seed)
        lengths = []
        for _ in range(1 + seed // 10):
            seq_len = rng.randint(1, 2 + seed // 8)
            lengths.append((rng.randint(1, seq_len), seq_len))
        compare(make_step(lengths, rng.randint(1, 6), seed), mine.cls, f"(seed {seed})")


@check("counters", spec="R3.14", hint=2)
def the_table_is_read_once_per_step(mine: Mine) -> None:
    """prepare runs once per step and forward once per layer, so what all layers share belongs into prepare."""
    step = make_step([(2, 6), (1, 5)])
    backend = mine.cls(make_spec(4))
    backend.prepare(step.metadata)
    step.metadata.block_table = torch.full_like(step.metadata.block_table, NUM_BLOCKS)  # no such block
    try:
        got = backend.forward(step.query, step.kv_cache, step.metadata)
    except IndexError:
        raise AssertionError("forward reads block_table: 30 layers would compute the same slots 30 times") from None
    error = (got - step.expected).abs().max().item()
    assert error < 1e-4, f"forward without the block table is off by {error:.2g}: prepare must keep the slots"
