"""A process in which Triton interprets its kernels on the CPU, and the cases that tests have it run.

Milestone: M4. Triton decides when it is imported whether kernels are compiled or interpreted, and the pytest process
has imported it long ago, or will in another test. So the cases run in a process of their own, one per test process: it
is told a case by name, and answers with what came of it.

    tests                                          this file as a program, TRITON_INTERPRET=1
    interpreter.call("random", seed=7)   ------>   random(seed=7)
    AssertionError, or the answer        <------   {"answer": ...} or {"error": ...}
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.sim.kernel_cost import AttentionShape, attention_operation, write_operation
from tests.m4.conformance import (
    BLOCK_SIZES,
    GROUPS,
    HEAD_SIZES,
    Batch,
    check,
    difference,
    make_batch,
    random_batch,
    reference,
    run,
    tolerance,
)


class Interpreter:
    """The process, as its parent sees it."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.m4.triton_interpreter"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )  # fmt: skip

    def call(self, case: str, **args: Any) -> Any:
        """What the function `case` of this file answers; AssertionError with its traceback if it raises."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([case, args]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the interpreting process died"
        result = json.loads(line)
        assert "error" not in result, result["error"]
        return result["answer"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve() -> None:
    import traceback

    torch.set_num_threads(1)
    answers = sys.stdout
    for line in sys.stdin:
        case, args = json.loads(line)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = {"answer": globals()[case](**args)}
        except Exception:
            result = {"error": traceback.format_exc()}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


# --- the cases: only the serving process calls these ------------------------------------------------------------------


def backend_class() -> Any:
    from folovllm.attention.backends.triton_paged import TritonPagedBackend, is_interpreted

    assert is_interpreted()
    return TritonPagedBackend


@contextlib.contextmanager
def cut_into(split_kv: int | None = None, tile: int | None = None) -> Iterator[None]:
    """Other sizes of parts and tiles, so that short sequences have several. `tile`: rows and keys of all tiles."""
    from folovllm.attention.backends import triton_paged

    right = triton_paged.tile_sizes

    def cut(spec: AttentionSpec) -> triton_paged.Tiles:
        tiles = right(spec)
        square = {} if tile is None else dict.fromkeys(("chunk", "single"), triton_paged.Tile(tile, tile))
        return replace(tiles, split_kv=split_kv or tiles.split_kv, **square)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_paged, "tile_sizes", cut)
        yield


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random(seed: int) -> float:
    """A small random step: every head size, group and block size takes its turn."""
    batch = random_batch(
        rng_of(20, seed), head_size=HEAD_SIZES[seed % 5], group=GROUPS[seed % 4],
        block_size=BLOCK_SIZES[seed % 9], max_reqs=3, max_len=24,
    )  # fmt: skip
    return check(backend_class(), batch, TorchNaiveBackend)


def shapes(shapes: list[tuple[str, int, int]], split_kv: int | None = None, seed: int = 0, **batch_args: Any) -> float:
    """The step of these (kind, computed, new)."""
    with cut_into(split_kv):
        return check(backend_class(), make_batch(rng_of(21, seed), shapes, **batch_args), TorchNaiveBackend)


def small_tiles(length: int) -> float:
    """Tiles of 16 rows and 16 keys, 5 tokens to a tile, so that a short prompt has many and chunks begin within one."""
    steps = [("prefill", 0, length), ("chunk", length - 7, 7), ("chunk", 3, length - 3), ("decode", length - 1, 1)]
    with cut_into(split_kv=16, tile=16):
        return check(backend_class(), make_batch(rng_of(22, length), steps), TorchNaiveBackend)


def extreme(seed: int) -> float:
    """Scores beyond +-1e4."""
    batch = random_batch(rng_of(23, seed), head_size=64, block_size=16, logit_scale=1e4, max_reqs=3, max_len=24)
    return check(backend_class(), batch, TorchNaiveBackend)


def winner(position: int) -> None:
    """One key scores +1e4 and the others -1e4: the answer is that key's value, to the last bit, in whatever part."""
    batch = make_batch(rng_of(24), [("decode", 36, 1)], group=8, block_size=4)
    (only,) = batch.sequences
    batch.query.fill_(100.0)
    only.key.fill_(-12.5)  # 64 * 100 * -12.5 / 8 = -1e4
    only.key[position] = 12.5
    with cut_into(split_kv=16, tile=16):
        got = run(backend_class()(batch.spec), batch)[0]
    assert torch.equal(got, only.value[position].expand(batch.spec.num_heads, -1))


def one_token() -> None:
    batch = make_batch(rng_of(25), [("prefill", 0, 1)])
    (only,) = batch.sequences
    got = run(backend_class()(batch.spec), batch)
    assert torch.equal(got[0], only.value[0].expand(batch.spec.num_heads, -1))


def written_in_this_very_step(seed: int) -> None:
    """R4.5: the second request's first blocks are the first one's, which are still empty."""
    batch = make_batch(rng_of(26, seed), [("prefill", 0, 20), ("prefix hit", 16, 5)], block_size=8)
    assert batch.history() is None
    check(backend_class(), batch, TorchNaiveBackend)


def cost(
    shapes: list[tuple[str, int, int]],
    split_kv: int | None = None,
    modelled_split_kv: int | None = None,
    **batch_args: Any,
) -> list[str]:
    """Compares what the kernels do with the cost model. Returns the names of the kernels that ran."""
    from folovllm.attention.backends import triton_paged
    from tests.triton_helpers import counted

    batch = make_batch(rng_of(31), shapes, **batch_args)
    spec, requests = batch.spec, [(s.computed, s.new) for s in batch.sequences]
    shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_size, spec.dtype.itemsize)
    with cut_into(split_kv), counted() as works:
        run(backend_class()(spec), batch)
    with cut_into(modelled_split_kv or split_kv):
        attention = attention_operation(shape, requests, triton_paged.tile_sizes(spec))
    written = write_operation(shape, sum(map(sum, requests)))  # a step before this one has written the computed tokens
    expected = attention.kernels | written.kernels
    assert works == expected, f"counted {works}, the model says {expected}"
    return sorted(works)


def copied_blocks() -> None:
    batch = make_batch(rng_of(27), [("decode", 30, 1)])
    backend = backend_class()(batch.spec)
    (only,) = batch.sequences
    caches = torch.full((2, *backend.kv_cache_shape(9)), float("nan"))  # two layers
    everything = _table_of([5, 2], 31, new=31)
    backend.prepare(everything)
    for cache in caches:
        backend.write(only.key, only.value, cache, everything)
    backend.copy_blocks(caches, [(5, 1), (2, 8)])
    for table in ([5, 2], [1, 8], [5, 8]):
        metadata = _table_of(table, 31, new=1)
        backend.prepare(metadata)
        for cache in caches:
            assert difference(backend.forward(batch.query, cache, metadata), reference(batch)) <= tolerance(batch)


def _table_of(block_ids: list[int], length: int, new: int) -> AttentionMetadata:
    return AttentionMetadata.single_sequence(length, block_ids, 16, num_computed_tokens=length - new)


def strided() -> None:
    """Queries, keys and values as the model has them: slices of one tensor [num_tokens, q + k + v]."""
    batch = make_batch(rng_of(28), [("prefill", 0, 9), ("prefill", 0, 1)], group=3, num_kv_heads=2, head_size=80)
    spec, metadata, backend = batch.spec, batch.metadata(), backend_class()(batch.spec)
    key, value = (torch.cat([getattr(s, name) for s in batch.sequences]) for name in ("key", "value"))
    fused = torch.cat([t.flatten(1) for t in (batch.query, key, value)], dim=1)  # [num_tokens, 10 * 80]
    query, key, value = (
        t.unflatten(1, (-1, 80)) for t in fused.split([spec.num_heads * 80, spec.num_kv_heads * 80, 160], dim=1)
    )
    assert not query.is_contiguous()
    cache = torch.full(backend.kv_cache_shape(batch.num_blocks), float("nan"))
    backend.prepare(metadata)
    backend.write(key, value, cache, metadata)
    out = backend.forward(query, cache, metadata)
    assert out.is_contiguous() and difference(out, reference(batch)) <= tolerance(batch)


def alone_and_in_company() -> None:
    """The bits of a request do not depend on its batch mates: where it is cut depends on nothing but itself."""
    alone = [make_batch(rng_of(29, i), [step]) for i, step in enumerate(_COMPANY)]
    together = _joined(alone)
    with cut_into(split_kv=64):
        got = run(backend_class()(together.spec), together).split([b.query.shape[0] for b in alone])
        for batch, part in zip(alone, got, strict=True):
            assert torch.equal(run(backend_class()(batch.spec), batch), part), batch.describe()


_COMPANY = [("decode", 20, 1), ("decode", 150, 1), ("prefill", 0, 30), ("chunk", 40, 9)]


def _joined(batches: list[Batch]) -> Batch:
    """One step of all; each keeps its own blocks, shifted."""
    sequences, num_blocks = [], 0
    for batch in batches:
        for s in batch.sequences:
            s.block_ids[:] = [b + num_blocks for b in s.block_ids]
            sequences.append(s)
        num_blocks += batch.num_blocks
    for batch in batches:  # the one cache that all of them fit into
        object.__setattr__(batch, "num_blocks", num_blocks)
    return Batch(batches[0].spec, sequences, num_blocks, torch.cat([b.query for b in batches]))


def refusal_in_bf16() -> str | None:
    return backend_class().refusal(AttentionSpec(4, 2, 64, torch.bfloat16, torch.device("cpu"), 16))


def engine(folder: str, name: str) -> None:
    """The engine on these kernels: the tokens of `generate_naive`, in chunks, with preemption."""
    from tests.m4.test_lattice_backends import backend_name
    from tests.parity_helpers import GapNaiveModel, make_engine, make_job, run_jobs

    model = GapNaiveModel(Path(folder))
    jobs = [make_job(model, length, 6, seed) for seed, length in enumerate((9, 17))]
    llm = make_engine(
        Path(folder), max_model_len=32, attention_backend=name, block_size=4, num_kv_blocks=9,
        max_num_seqs=3, enable_chunked_prefill=True, max_num_batched_tokens=7,
    )  # fmt: skip
    assert backend_name(llm) == "triton_paged"
    assert run_jobs(llm, jobs, late=1) == [job.tokens for job in jobs]
    assert llm.stats().num_preemptions > 0


# --- kernels that are wrong on purpose --------------------------------------------------------------------------------


def finds(mistake: str) -> bool:
    """Whether `check` notices that every program was told something wrong."""
    right = backend_class()

    class Wrong(right):  # type: ignore[misc, valid-type]
        def prepare(self, metadata: AttentionMetadata) -> None:
            super().prepare(metadata)
            step = metadata.prepared
            if mistake == "one key too many":
                step.seq_lens.add_(1)
            elif mistake == "a tile is forgotten":
                object.__setattr__(step, "tiles", step.tiles[:-1])
            elif mistake == "blocks in order":
                metadata.block_table = metadata.block_table.sort(dim=1, descending=True).values

    batch = make_batch(rng_of(30), [("prefill", 0, 40), ("decode", 30, 1)], block_size=8)
    try:
        check(Wrong, batch)
    except AssertionError:
        return True
    return False


if __name__ == "__main__":
    serve()
