"""Prefix caching on the C++ attention kernel: hits, and the copy of a block that is hit in part, in its own KV layout.

Milestone: M6. The torch backends are in test_llm_cache.py; the oracle is `generate_naive`, which has no cache at all.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.cpu_paged import CpuPagedBackend
from folovllm.csrc.build import load_ops
from tests.m6.cache_helpers import INDEXES
from tests.m6.test_llm_cache import CACHED, SHAPES
from tests.parity_helpers import GapNaiveModel, Job, make_engine, make_job, run_jobs

pytestmark = [pytest.mark.m6, pytest.mark.skipif(load_ops() is None, reason="no C++ kernels on this machine")]


@pytest.fixture(scope="module")
def jobs(tiny_model_dir: Callable[[str], Path]) -> list[Job]:
    model = GapNaiveModel(tiny_model_dir("llama"))
    return [make_job(model, length, num_tokens, seed=0) for length, num_tokens in SHAPES]


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("index", INDEXES)
def test_cold_warm_and_copied(
    index: str, partial: bool, block_size: int, jobs: list[Job], tiny_model_dir: Callable[[str], Path]
) -> None:
    engine = make_engine(
        tiny_model_dir("llama"), block_size=block_size, attention_backend="cpu_paged", prefix_index=index,
        partial_block_hits=partial, max_num_batched_tokens=17, enable_chunked_prefill=True, **CACHED,
    )  # fmt: skip
    assert isinstance(engine.engine_core.executor.worker.model_runner.backend, CpuPagedBackend)  # type: ignore[attr-defined]
    hits = []
    for _ in range(2):
        assert run_jobs(engine, jobs) == [job.tokens for job in jobs]
        hits.append(engine.stats().prefix_cache_hits)
    whole = sum((length - 1) // block_size * block_size for length, _ in SHAPES)
    assert hits[1] - hits[0] >= whole and hits[0] > 0


def test_a_pool_that_evicts_and_copies(jobs: list[Job], tiny_model_dir: Callable[[str], Path]) -> None:
    engine = make_engine(
        tiny_model_dir("llama"), block_size=5, attention_backend="cpu_paged", partial_block_hits=True,
        num_kv_blocks=14, **CACHED,
    )  # fmt: skip
    for _ in range(3):
        assert run_jobs(engine, jobs) == [job.tokens for job in jobs]
    stats = engine.stats()
    assert stats.num_preemptions > 0 and stats.prefix_cache_hits % 5 > 0, "nothing was preempted, or nothing copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (80, 5), (128, 1)])
def test_a_copy_is_the_whole_block_and_nothing_else(head_size: int, block_size: int, dtype: torch.dtype) -> None:
    """Its layout is its own: a copy is what `write` would have put there, in every layer; no neighbour is touched."""
    backend = CpuPagedBackend(AttentionSpec(4, 2, head_size, dtype, torch.device("cpu"), block_size))
    generator = torch.Generator().manual_seed(0)
    caches = torch.full((3, *backend.kv_cache_shape(6)), 7.0, dtype=dtype)  # [num_layers, *kv_cache_shape]
    expected = caches.clone()
    for cache, wanted in zip(caches, expected, strict=True):
        key, value = (torch.randn(block_size, 2, head_size, generator=generator).to(dtype) for _ in "kv")
        backend.write(key, value, cache, written_to(2, block_size))
        for block in (2, 4, 1):
            backend.write(key, value, wanted, written_to(block, block_size))
    backend.copy_blocks(caches, [(2, 4), (2, 1)])
    assert torch.equal(caches, expected) and not torch.equal(caches[0], caches[1])


def written_to(block: int, block_size: int) -> AttentionMetadata:
    """As much of a step's metadata as `write` looks at: all slots of one block."""
    return AttentionMetadata.single_sequence(block_size, [block], block_size)
