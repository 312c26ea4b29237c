"""The contract of an attention backend, as tools: random ragged batches, an fp64 reference, and how close is close.

Milestone: M4. Any backend's tests can use them: `check(backend_class, random_batch(rng, ...))`.

Everything goes through the backend's own `write`, `prepare` and `forward`, so its KV layout does not matter. The cache
is NaN before anything is written: a backend that reads a slot it was not given answers NaN.

**How close.** Attention is a mean of value rows: with exact weights p, out = sum p_j v_j. What a correct kernel may get
wrong, with V = max |v|, u = half the spacing of the dtype at 1 and u32 that of fp32:
    u V       rounding the output
    u V       rounding the weights to the dtype before they meet V, as every kernel on matrix units does
    2 d V     scores: an error d of a score changes its weight by the factor e^d; sums run in fp32, so d is a few u32
              times the largest |q| |k| / sqrt(head_size), whatever the dtype; softmax, its sum and the division add a
              few u32 more
Nothing here grows with the length of the context. So
    tolerance = V (2 u + 4 u32 (1 + max |q| |k| / sqrt(head_size)))
E.g. for |v| <= 4 and |q| |k| / sqrt(head_size) <= 10: 1.1e-5 in fp32, 3.1e-2 in bf16, 3.9e-3 in fp16. A kernel that
rounds its scores to bf16 breaks it as soon as they are large.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from folovllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec

HEAD_SIZES = (64, 80, 96, 128, 256)
GROUPS = (1, 3, 7, 8)  # query heads per KV head
BLOCK_SIZES = (1, 2, 3, 5, 8, 16, 32, 64, None)  # None: one page holds the longest request (the contiguous cache)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("prefill", "chunk", "decode", "resumed", "prefix hit")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class CachedSequence:
    """One request: `computed` tokens in the cache, `new` ones in this step."""

    computed: int
    new: int
    key: torch.Tensor  # [computed + new, num_kv_heads, head_size]
    value: torch.Tensor  # [computed + new, num_kv_heads, head_size]
    block_ids: list[int]
    num_shared: int = 0  # leading tokens that lie in another request's blocks, which writes them

    @property
    def seq_len(self) -> int:
        return self.computed + self.new


@dataclass(frozen=True)
class Batch:
    """One step: everything a backend is given, and everything the reference needs."""

    spec: AttentionSpec
    sequences: list[CachedSequence]
    num_blocks: int
    query: torch.Tensor  # [num_tokens, num_heads, head_size]

    def metadata(self) -> AttentionMetadata:
        """Of this step."""
        return self._metadata([(s, s.computed, s.seq_len) for s in self.sequences])

    def history(self) -> AttentionMetadata | None:
        """Of an earlier step that computed what is in the cache already; None when nothing is."""
        rows = [(s, s.num_shared, s.computed) for s in self.sequences if s.computed > s.num_shared]
        return self._metadata(rows) if rows else None

    def _metadata(self, rows: list[tuple[CachedSequence, int, int]]) -> AttentionMetadata:
        """rows: (sequence, first position, end) of the tokens that the step computes."""
        width = max(len(s.block_ids) for s in self.sequences) + 1  # a table is as wide as the longest request may get
        table = torch.tensor([s.block_ids + [0] * (width - len(s.block_ids)) for s, _, _ in rows], dtype=torch.int32)
        slots = [s.block_ids[p // self.block_size] * self.block_size + p % self.block_size
                 for s, first, end in rows for p in range(first, end)]  # fmt: skip
        return AttentionMetadata(
            query_start_loc=[0, *np.cumsum([end - first for _, first, end in rows]).tolist()],
            seq_lens=[end for _, _, end in rows],
            block_table=table.to(self.spec.device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=self.spec.device),
            block_size=self.block_size,
        )

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    def describe(self) -> str:
        spec = self.spec
        return (
            f"{spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_size}, {spec.dtype}, "
            f"blocks of {spec.block_size}, (computed, new): {[(s.computed, s.new) for s in self.sequences]}"
        )


def random_batch(
    rng: np.random.Generator,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    head_size: int | None = None,
    group: int | None = None,
    block_size: int | None = -1,
    max_reqs: int = 5,
    max_len: int = 40,
    logit_scale: float | None = None,
) -> Batch:
    """A step of any mix of prefills, chunks, decodes, resumed requests and prefix hits, in blocks of random order.

    What is not given is drawn. `block_size=None` is one page per request; `logit_scale` is about how large scores get.
    """
    shapes = [random_shape(rng, max_len) for _ in range(rng.integers(1, max_reqs + 1))]
    return make_batch(
        rng,
        shapes,
        dtype,
        device,
        head_size or int(rng.choice(HEAD_SIZES)),
        group or int(rng.choice(GROUPS)),
        BLOCK_SIZES[rng.integers(len(BLOCK_SIZES))] if block_size == -1 else block_size,
        num_kv_heads=int(rng.integers(1, 4)),
        logit_scale=logit_scale or float(rng.choice([0.3, 1.0, 4.0])),
    )


def random_shape(rng: np.random.Generator, max_len: int) -> tuple[str, int, int]:
    """(kind, computed, new). A resumed request recomputes its outputs with its prompt, and a chunk of that may have run
    already: its two numbers are anything at all."""
    kind = str(rng.choice(KINDS))
    length = int(rng.integers(2, max_len + 1))
    new = {"prefill": length, "decode": 1}.get(kind) or int(rng.integers(1, length))
    return kind, (0 if kind == "prefill" else length - new), new


def make_batch(
    rng: np.random.Generator,
    shapes: Sequence[tuple[str, int, int]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    head_size: int = 64,
    group: int = 3,
    block_size: int | None = 16,
    num_kv_heads: int = 1,
    logit_scale: float = 1.0,
) -> Batch:
    """The batch of these (kind, computed, new), in random order.

    A "prefix hit" shares as many leading blocks of an earlier request of the list as `computed` covers whole; that
    request may be writing those very blocks in this step (R4.5).
    """
    page = block_size or max(computed + new for _, computed, new in shapes)
    needed = sum(-(-(computed + new) // page) for _, computed, new in shapes)
    num_blocks = needed + 1 + int(rng.integers(1, 4))  # the null block, and blocks that belong to nobody
    free = (1 + rng.permutation(num_blocks - 1)).tolist()
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    spec = AttentionSpec(num_kv_heads * group, num_kv_heads, head_size, dtype, torch.device(device), page)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, head_size, generator=generator) * scale).to(device, dtype)

    sequences: list[CachedSequence] = []
    for kind, computed, new in shapes:
        donor = sequences[rng.integers(len(sequences))] if kind == "prefix hit" and sequences else None
        num_shared = min(computed, donor.seq_len) // page * page if donor else 0
        key, value = draw(computed + new, num_kv_heads), draw(computed + new, num_kv_heads)
        block_ids = donor.block_ids[: num_shared // page] if donor else []
        if donor:
            key[:num_shared], value[:num_shared] = donor.key[:num_shared], donor.value[:num_shared]
        while len(block_ids) < -(-(computed + new) // page):
            block_ids = [*block_ids, free.pop()]
        sequences.append(CachedSequence(computed, new, key, value, block_ids, num_shared))
    sequences = [sequences[i] for i in rng.permutation(len(sequences))]
    query = draw(sum(s.new for s in sequences), spec.num_heads, scale=logit_scale)
    return Batch(spec, sequences, num_blocks, query)


def run(backend: AttentionBackend, batch: Batch) -> torch.Tensor:
    """The backend's answer for a batch, on a cache that was NaN: [num_tokens, num_heads, head_size]."""
    shape = backend.kv_cache_shape(batch.num_blocks)
    cache = torch.full(shape, float("nan"), dtype=batch.spec.dtype, device=batch.spec.device)
    history = batch.history()
    if history is not None:
        old = [(s, slice(s.num_shared, s.computed)) for s in batch.sequences]
        step(backend, history, cache, old)
    metadata = batch.metadata()
    step(backend, metadata, cache, [(s, slice(s.computed, s.seq_len)) for s in batch.sequences])
    return backend.forward(batch.query, cache, metadata)


def step(
    backend: AttentionBackend,
    metadata: AttentionMetadata,
    cache: torch.Tensor,
    parts: list[tuple[CachedSequence, slice]],
) -> None:
    """What a step does before attention: `prepare` once, then `write` of all its tokens."""
    backend.prepare(metadata)
    key, value = (torch.cat([getattr(s, name)[part] for s, part in parts]) for name in ("key", "value"))
    backend.write(key, value, cache, metadata)


def reference(batch: Batch) -> torch.Tensor:
    """The formula in fp64, from the sequences themselves: no cache, no blocks. [num_tokens, num_heads, head_size]"""
    outputs, row, group = [], 0, batch.spec.num_queries_per_kv
    for s in batch.sequences:
        query = batch.query[row : row + s.new].double().transpose(0, 1)  # [num_heads, new, head_size]
        key = s.key.double().repeat_interleave(group, dim=1).permute(1, 2, 0)  # [num_heads, head_size, seq_len]
        value = s.value.double().repeat_interleave(group, dim=1).transpose(0, 1)  # [num_heads, seq_len, head_size]
        future = torch.ones(s.new, s.seq_len, dtype=torch.bool, device=query.device).triu(s.computed + 1)
        scores = (query @ key * batch.spec.scale).masked_fill(future, float("-inf"))  # [num_heads, new, seq_len]
        outputs.append((scores.softmax(dim=-1) @ value).transpose(0, 1))
        row += s.new
    return torch.cat(outputs)


def tolerance(batch: Batch) -> float:
    """How far from `reference` a correct kernel may be; the head of this file derives it."""
    largest_value = max(float(s.value.abs().max()) for s in batch.sequences)
    largest_key = max(float(s.key.float().norm(dim=-1).max()) for s in batch.sequences)
    largest_score = float(batch.query.float().norm(dim=-1).max()) * largest_key * batch.spec.scale
    return largest_value * (2 * UNIT[batch.spec.dtype] + 4 * UNIT[torch.float32] * (1 + largest_score))


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; infinite where something is NaN."""
    return float((got.double() - expected.double()).abs().nan_to_num(nan=float("inf")).max())


def check(
    backend_class: Callable[[AttentionSpec], AttentionBackend],
    batch: Batch,
    naive_class: Callable[[AttentionSpec], AttentionBackend] | None = None,
) -> float:
    """AssertionError unless the backend is within tolerance of fp64 and, if given, of the oracle backend.

    Returns its share of the tolerance: 0.1 is a tenth of what it may be off.
    """
    got = run(backend_class(batch.spec), batch)
    assert got.shape == batch.query.shape and got.dtype == batch.query.dtype
    allowed, error = tolerance(batch), difference(got, reference(batch))
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}: {batch.describe()}"
    if naive_class is not None:
        # Both are within `allowed` of the truth, so they are within twice that of one another.
        apart = difference(got, run(naive_class(batch.spec), batch))
        assert apart <= 2 * allowed, f"{apart:.3g} from the oracle, allowed {2 * allowed:.3g}: {batch.describe()}"
    return error / allowed
