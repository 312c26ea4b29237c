"""Every attention backend against the oracle and an fp64 reference (R4.1 to R4.6).

Milestone: M4. Parametrised over all names of the registry: those that cannot run here are skipped, with their reason.
`tests/m4/conformance.py` has the batches, the reference and the tolerance, and says where it comes from.
"""

from typing import Any

import numpy as np
import pytest
import torch

from folovllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, sequence_slots
from folovllm.attention.backends.torch_flash import TorchFlashBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend, causal_mask
from folovllm.attention.backends.torch_sdpa import TorchSdpaBackend
from folovllm.attention.selector import BACKENDS, load_backend, refusal
from tests.m4.conformance import (
    BLOCK_SIZES,
    DTYPES,
    GROUPS,
    HEAD_SIZES,
    UNIT,
    Batch,
    check,
    difference,
    make_batch,
    random_batch,
    reference,
    run,
    tolerance,
)

pytestmark = pytest.mark.m4

NUM_RANDOM = 200  # per backend and dtype: 600 per backend
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

BackendClass = type[AttentionBackend]


def runnable(name: str, batch: Batch) -> BackendClass:
    """The backend's class, or skip with the reason why it refuses this batch."""
    reason = refusal(name, batch.spec)
    if reason is not None:
        pytest.skip(f"{name} refuses: {reason}")
    return load_backend(name)


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- thousands of random steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_random_batches(name: str, dtype: torch.dtype, device: str) -> None:
    """Head sizes, groups and block sizes take turns, so that each is met; what a backend refuses is counted."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    runnable(name, make_batch(rng_of(0), [("prefill", 0, 2)], dtype, device))
    shares, refused = [], 0
    for seed in range(NUM_RANDOM):
        batch = random_batch(
            rng_of(1, seed),
            dtype,
            device,
            head_size=HEAD_SIZES[seed % len(HEAD_SIZES)],
            group=GROUPS[seed % len(GROUPS)],
            block_size=BLOCK_SIZES[seed % len(BLOCK_SIZES)],
        )
        if refusal(name, batch.spec) is None:
            shares.append(check(load_backend(name), batch, TorchNaiveBackend))
        else:
            refused += 1
    print(f"{name}, {dtype}: {len(shares)} batches, worst at {max(shares):.2f} of the tolerance, {refused} refused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_extreme_logits(name: str, dtype: torch.dtype) -> None:
    """Scores beyond +-1e4: exp of them is infinite or zero, and softmax must not care."""
    backend_class = runnable(name, make_batch(rng_of(0), [("prefill", 0, 2)], dtype))
    largest = 0.0
    for seed in range(25):
        batch = random_batch(rng_of(2, seed), dtype, head_size=64, block_size=16, logit_scale=1e4)
        check(backend_class, batch, TorchNaiveBackend)
        largest = max(largest, largest_score(batch))
    assert largest > 1e4


def largest_score(batch: Batch) -> float:
    first = batch.sequences[0]
    scores = batch.query[: first.new, :1].float().squeeze(1) @ first.key[:, 0].float().T  # [new, seq_len]
    return float(scores.abs().max()) * batch.spec.scale


@pytest.mark.parametrize("winner", [0, 20, 36])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_key_that_outweighs_all_gives_its_value(name: str, dtype: torch.dtype, winner: int) -> None:
    """One key scores +1e4 and the others -1e4: the answer is that key's value, to the last bit."""
    batch = make_batch(rng_of(3), [("decode", 36, 1)], dtype, group=8, block_size=4)
    backend_class = runnable(name, batch)
    (only,) = batch.sequences
    batch.query.fill_(100.0)
    only.key.fill_(-12.5)  # 64 * 100 * -12.5 / 8 = -1e4
    only.key[winner] = 12.5
    expected = only.value[winner].expand(batch.spec.num_heads, -1)  # [num_heads, head_size]
    assert torch.equal(run(backend_class(batch.spec), batch)[0], expected)


# --- shapes that break things -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_one_token_alone_gets_its_own_value(name: str, dtype: torch.dtype) -> None:
    batch = make_batch(rng_of(4), [("prefill", 0, 1)], dtype)
    (only,) = batch.sequences
    got = run(runnable(name, batch)(batch.spec), batch)
    assert torch.equal(got[0], only.value[0].expand(batch.spec.num_heads, -1))


@pytest.mark.parametrize("block_size", [1, 2, 16, 64, None])
@pytest.mark.parametrize("name", BACKENDS)
def test_around_block_boundaries(name: str, block_size: int | None) -> None:
    """Lengths of one and of two blocks, minus one, exact, plus one; as decode, as prompt, and with a resumed middle."""
    edge = block_size or 48
    lengths = sorted({max(1, n * edge + d) for n in (1, 2) for d in (-1, 0, 1)})
    shapes = [(kind, length - new, new) for length in lengths for kind, new in
              (("decode", 1), ("prefill", length), ("resumed", (length + 1) // 2))]  # fmt: skip
    batch = make_batch(rng_of(5, edge), shapes, block_size=block_size)
    check(runnable(name, batch), batch, TorchNaiveBackend)


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257, 513])
@pytest.mark.parametrize("name", BACKENDS)
def test_around_tile_boundaries(name: str, length: int) -> None:
    """The same for tiles, 128 and 256 in torch_flash; the chunks shift the diagonal through them."""
    shapes = [("decode", length - 1, 1), ("prefill", 0, length), ("chunk", length - 100, 100), ("chunk", 3, length - 3)]
    batch = make_batch(rng_of(6, length), shapes)
    check(runnable(name, batch), batch, TorchNaiveBackend)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_hundred_requests(name: str) -> None:
    """A busy step: decodes of many lengths, and two prompts among them."""
    shapes = [("decode", 1 + 7 * i % 150, 1) for i in range(98)] + [("prefill", 0, 30), ("prefill", 0, 30)]
    batch = make_batch(rng_of(12), shapes)
    check(runnable(name, batch), batch, TorchNaiveBackend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_context_of_8192(name: str, dtype: torch.dtype) -> None:
    shapes = [("decode", 8191, 1), ("chunk", 8192 - 17, 17), ("decode", 40, 1)]
    batch = make_batch(rng_of(7), shapes, dtype, num_kv_heads=2)
    check(runnable(name, batch), batch, TorchNaiveBackend)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_prefix_that_is_being_written_in_this_very_step(name: str) -> None:
    """R4.5: both requests are new, the second one's first two blocks are the first one's, which are still empty."""
    seen = set()
    for seed in range(8):
        batch = make_batch(rng_of(8, seed), [("prefill", 0, 40), ("prefix hit", 32, 5)], block_size=16)
        first, second = batch.sequences
        assert first.block_ids[:2] == second.block_ids[:2] and batch.history() is None
        seen.add(first.num_shared)
        check(runnable(name, batch), batch, TorchNaiveBackend)
    assert seen == {0, 32}, "whoever shares comes before its donor, and after it"


@pytest.mark.parametrize("name", BACKENDS)
def test_copied_blocks_read_like_the_originals(name: str) -> None:
    batch = make_batch(rng_of(9), [("decode", 30, 1)], block_size=16)
    backend = runnable(name, batch)(batch.spec)
    (only,) = batch.sequences
    caches = torch.full((2, *backend.kv_cache_shape(9)), float("nan"))  # two layers
    everything = AttentionMetadata.single_sequence(31, [5, 2], 16)
    backend.prepare(everything)
    for cache in caches:
        backend.write(only.key, only.value, cache, everything)
    backend.copy_blocks(caches, [(5, 1), (2, 8)])
    for table in ([5, 2], [1, 8], [5, 8]):
        metadata = AttentionMetadata.single_sequence(31, table, 16, num_computed_tokens=30)
        backend.prepare(metadata)
        for cache in caches:
            assert difference(backend.forward(batch.query, cache, metadata), reference(batch)) <= tolerance(batch)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_instance_serves_many_steps(name: str) -> None:
    """Nothing of one step is left in the backend for the next: the same batch gives the same bits after another."""
    batches = [make_batch(rng_of(10, i), [("chunk", 7 * i, 9), ("decode", 20, 1)], block_size=8) for i in range(2)]
    backend = runnable(name, batches[0])(batches[0].spec)
    assert batches[0].spec == batches[1].spec
    first = run(backend, batches[0])
    run(backend, batches[1])
    assert torch.equal(run(backend, batches[0]), first)


# --- the suite can fail -----------------------------------------------------------------------------------------------


class OneKeyTooMany(TorchNaiveBackend):
    def prepare(self, metadata: AttentionMetadata) -> None:
        table = torch.nn.functional.pad(metadata.block_table, (0, 1))
        metadata.prepared = [
            (sequence_slots(table[i], n + 1, metadata.block_size), None) for i, n in enumerate(metadata.seq_lens)
        ]


class NoMask(TorchNaiveBackend):
    def prepare(self, metadata: AttentionMetadata) -> None:
        super().prepare(metadata)
        metadata.prepared = [(slots, None) for slots, _ in metadata.prepared]


class TopLeftMask(TorchNaiveBackend):
    """The trap of is_causal=True."""

    def prepare(self, metadata: AttentionMetadata) -> None:
        super().prepare(metadata)
        metadata.prepared = [
            (slots, None if mask is None else torch.ones_like(mask).triu(1)) for slots, mask in metadata.prepared
        ]


class BlocksInARow(TorchNaiveBackend):
    """Believes that the blocks of a request follow one another."""

    def prepare(self, metadata: AttentionMetadata) -> None:
        table = metadata.block_table
        in_a_row = table[:, :1] + torch.arange(table.shape[1])
        super().prepare(metadata)
        start, lens = metadata.query_start_loc, metadata.seq_lens
        last_slot = table.max() * metadata.block_size + metadata.block_size - 1
        metadata.prepared = [
            (
                sequence_slots(in_a_row[i], lens[i], metadata.block_size).clamp(max=last_slot),
                causal_mask(start[i + 1] - start[i], lens[i], table.device),
            )
            for i in range(metadata.num_reqs)
        ]


class WrongKVHead(TorchNaiveBackend):
    """Query head h reads KV head h mod n instead of h div group."""

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        group, num_kv_heads = self.spec.num_queries_per_kv, self.spec.num_kv_heads
        order = torch.arange(self.spec.num_heads).view(group, num_kv_heads).T.flatten()
        out = super().forward(query[:, order], kv_cache, metadata)
        return out[:, order.argsort()]


class HalfPrecisionScores(TorchNaiveBackend):
    """Scales the query in its own dtype before the product."""

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return super()._attend((query.float() * 0.3).to(query.dtype).float() / 0.3, key, value, mask).to(query.dtype)


class NoCorrection(TorchFlashBackend):
    """An online softmax that forgets to rescale what it has summed up before."""

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchFlashBackend, "BLOCK_KV", 8)
            exp = torch.exp
            patch.setattr(torch, "exp", lambda x: torch.ones_like(exp(x)))
            return super().forward(query, kv_cache, metadata)


class PaddingOfOthers(TorchSdpaBackend):
    """Pads the keys with slots behind the end of the sequence, which are not its own."""

    def prepare(self, metadata: AttentionMetadata) -> None:
        super().prepare(metadata)
        for group in metadata.prepared:
            if group.mask is not None:
                group.slots[-1] = 0


class ReadsWhileWriting(TorchNaiveBackend):
    """Attends request by request while it writes: what a later request of the step writes comes too late (R4.5)."""

    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        self.pending = (key, value)

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        key, value = self.pending
        out = torch.empty_like(query)
        for first, end in zip(metadata.query_start_loc, metadata.query_start_loc[1:], strict=False):
            slots = metadata.slot_mapping[first:end]
            by_slot = self.by_slot(kv_cache)
            by_slot[0, slots], by_slot[1, slots] = key[first:end], value[first:end]
            out[first:end] = super().forward(query, kv_cache, metadata)[first:end]
        return out


MUTANTS = [
    OneKeyTooMany,
    NoMask,
    TopLeftMask,
    BlocksInARow,
    WrongKVHead,
    NoCorrection,
    PaddingOfOthers,
    ReadsWhileWriting,
]


def is_found(mutant: Any, **batch_args: Any) -> bool:
    for seed in range(25):
        try:
            check(mutant, random_batch(rng_of(1, seed), **batch_args))
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_random_batches_find(mutant: Any) -> None:
    """Each of these mistakes fails within the first 25 batches, in every dtype."""
    assert all(is_found(mutant, dtype=dtype) for dtype in DTYPES)


def test_large_logits_find_scores_in_half_precision() -> None:
    """Scores rounded to bf16 are lost in the rounding of the output until they are large."""
    assert is_found(HalfPrecisionScores, dtype=torch.bfloat16, logit_scale=1e4)
    assert is_found(HalfPrecisionScores, dtype=torch.float16, logit_scale=1e4)


def test_the_tolerances_are_not_generous() -> None:
    """The oracle, which rounds nothing but its output, uses a twentieth of what it is allowed in fp32 and a quarter in
    half precision: a kernel that is a few times worse than it should be fails."""
    for dtype, least in zip(DTYPES, (0.05, 0.25, 0.25), strict=True):
        shares = [check(TorchNaiveBackend, random_batch(rng_of(11, seed), dtype)) for seed in range(40)]
        print(f"{dtype}: the oracle uses up to {max(shares):.2f} of its tolerance")
        assert least < max(shares) < 1
    assert all(torch.finfo(dtype).eps / 2 == UNIT[dtype] for dtype in DTYPES)


def test_random_batches_have_every_shape() -> None:
    batches = [random_batch(rng_of(1, seed)) for seed in range(NUM_RANDOM)]
    sequences = [s for batch in batches for s in batch.sequences]
    assert any(s.computed == 0 and s.new > 1 for s in sequences)
    assert any(s.computed > 0 and s.new > 1 for s in sequences)
    assert any(s.new == 1 and s.computed > 0 for s in sequences)
    assert sum(s.num_shared > 0 for s in sequences) > 20
    assert {len({s.new for s in batch.sequences}) for batch in batches} >= {1, 2, 3, 4}
    assert any(s.block_ids != sorted(s.block_ids) for s in sequences)


def test_spec_of_a_batch() -> None:
    batch = make_batch(rng_of(0), [("chunk", 5, 3), ("decode", 8, 1)], group=7, num_kv_heads=2, block_size=None)
    assert batch.spec == AttentionSpec(14, 2, 64, torch.float32, torch.device("cpu"), block_size=9)
    assert sorted(len(s.block_ids) for s in batch.sequences) == [1, 1]
