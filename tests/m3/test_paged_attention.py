"""Paged attention through the whole engine: who owns which slot, and that no request reads another's (R3.14 to R3.19).

Milestone: M3. Slots that no request owns are NaN at every step: one that leaks into an output turns all of it to NaN.
Blocks are handed out in random order: nothing may depend on which physical block holds what.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.attention.backend import AttentionMetadata, AttentionSpec, sequence_slots
from folovllm.attention.backends.torch_naive import TorchNaiveBackend, causal_mask
from folovllm.core.sched.output import NewRequestData
from folovllm.engine.llm_engine import LLMEngine
from folovllm.sampling_params import SamplingParams
from folovllm.worker.block_table import BlockTable
from folovllm.worker.input_batch import CachedRequestState, InputBatch
from folovllm.worker.model_runner import ModelRunner
from tests.parity_helpers import GapNaiveModel, Job, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m3

MAX_MODEL_LEN = 64
SHAPES = [(1, 30), (16, 20), (5, 24), (17, 24), (40, 24), (2, 12), (33, 8)]  # (prompt length, output tokens)

MakeTiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def jobs(tiny_model_dir: MakeTiny) -> list[Job]:
    model = GapNaiveModel(tiny_model_dir("llama"))
    return [make_job(model, length, count, seed) for seed, (length, count) in enumerate(SHAPES)]


def tokens_of(jobs: list[Job]) -> list[list[int]]:
    return [job.tokens for job in jobs]


# --- no request reads another's slots ---------------------------------------------------------------------------------


def runner_of(engine: LLMEngine) -> ModelRunner:
    return engine.engine_core.executor.worker.model_runner


def owned_slots(runner: ModelRunner) -> list[int]:
    """Slots that hold K/V of requests in the batch, before the step's own tokens are written."""
    batch = runner.batch
    slots: list[int] = []
    for row in range(batch.num_reqs):
        table = torch.from_numpy(batch.block_table.table[row])
        slots += sequence_slots(table, int(batch.num_computed_tokens[row]), batch.block_table.block_size).tolist()
    return slots


def poison_unowned(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Before every forward pass fill all slots but the owned ones with NaN. Returns a list: slots poisoned per step."""
    runner, poisoned = runner_of(engine), []
    runner.kv_caches.fill_(float("nan"))
    prepare = runner._prepare_inputs

    def prepare_and_poison(output: Any) -> Any:
        by_slot = runner.kv_caches.flatten(2, 3)  # [num_layers, 2, num_slots, num_kv_heads, head_size]
        free = torch.ones(by_slot.shape[2], dtype=torch.bool)
        free[owned_slots(runner)] = False
        by_slot[:, :, free] = float("nan")
        poisoned.append(int(free.sum()))
        return prepare(output)

    monkeypatch.setattr(runner, "_prepare_inputs", prepare_and_poison)
    return poisoned


ENGINES: dict[str, dict[str, Any]] = {
    "contiguous": {"block_size": "max_model_len"},
    "blocks of 16": {"block_size": 16},
    "blocks of 5, preempting": {"block_size": 5, "num_kv_blocks": 14},
    "slots": {"block_size": 1, "num_kv_blocks": MAX_MODEL_LEN + 1},
    "chunks": {"block_size": 16, "enable_chunked_prefill": True, "max_num_batched_tokens": 6},
}


@pytest.mark.parametrize("engine_args", ENGINES.values(), ids=ENGINES)
def test_slots_of_nobody_never_leak(
    engine_args: dict[str, Any], tiny_model_dir: MakeTiny, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model_dir("llama"), max_model_len=MAX_MODEL_LEN, max_num_seqs=4, **engine_args)
    poisoned = poison_unowned(engine, monkeypatch)
    wanting_logprobs = [Job(job.prompt_token_ids, job.params.replace(logprobs=1), [], 0.0) for job in jobs]
    assert run_jobs(engine, wanting_logprobs, late=3) == tokens_of(jobs)
    assert len(poisoned) == engine.stats().num_steps and min(poisoned) > 0
    assert ("num_kv_blocks" in engine_args) == (engine.stats().num_preemptions > 0)


def test_the_poison_works(tiny_model_dir: MakeTiny, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that reads one slot too many computes NaN, whose argmax is 0: the test above can fail."""
    engine = make_engine(tiny_model_dir("llama"), max_model_len=MAX_MODEL_LEN, max_num_seqs=4, block_size=16)
    poison_unowned(engine, monkeypatch)
    backend = runner_of(engine).backend

    def prepare_one_slot_too_many(metadata: AttentionMetadata) -> None:
        metadata.prepared = []
        for i, seq_len in enumerate(metadata.seq_lens):
            q_len = metadata.query_start_loc[i + 1] - metadata.query_start_loc[i]
            mask = causal_mask(q_len, seq_len, torch.device("cpu"))  # [q_len, seq_len]
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1))  # the slot too many is visible
            table = torch.nn.functional.pad(metadata.block_table[i], (0, 1))
            metadata.prepared.append((sequence_slots(table, seq_len + 1, metadata.block_size), mask))

    monkeypatch.setattr(backend, "prepare", prepare_one_slot_too_many)
    assert run_jobs(engine, jobs) == [[0] * len(job.tokens) for job in jobs]


SHUFFLED_POOL = """
import random

from folovllm.core.block_pool import BlockPool

RNG = random.Random({seed})


class ShuffledPool(BlockPool):
    '''Hands out any free blocks, in any order.'''

    def get_new_blocks(self, num_blocks):
        free = self.free_block_queue.get_all_free_blocks()
        if num_blocks > len(free):
            raise ValueError("too few")
        for block in (chosen := RNG.sample(free, num_blocks)):
            self.free_block_queue.remove(block)
            block.ref_cnt = 1
        return chosen
"""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_kv_blocks", [None, 14])
def test_physical_block_ids_mean_nothing(
    seed: int, num_kv_blocks: int | None, tiny_model_dir: MakeTiny, jobs: list[Job], tmp_path: Path
) -> None:
    pool = tmp_path / "pool.py"
    pool.write_text(SHUFFLED_POOL.format(seed=seed))
    args: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "block_size": 5, "num_kv_blocks": num_kv_blocks}
    engine = make_engine(
        tiny_model_dir("llama"), max_num_seqs=4, parts={"core.block_pool": f"{pool}:ShuffledPool"}, **args
    )
    manager = engine.engine_core.scheduler.kv_cache_manager
    assert type(manager.block_pool).__name__ == "ShuffledPool"
    assert run_jobs(engine, jobs, late=3) == tokens_of(jobs)
    assert (num_kv_blocks is not None) == (engine.stats().num_preemptions > 0)


def test_contiguous_and_paged_give_the_same_logprobs(tiny_model_dir: MakeTiny, jobs: list[Job]) -> None:
    """Not only the same tokens: the pages hold the same numbers, bit for bit, in whatever size they come."""

    def logprobs(block_size: int | str) -> list[float]:
        engine = make_engine(tiny_model_dir("llama"), max_model_len=MAX_MODEL_LEN, block_size=block_size)
        for i, job in enumerate(jobs):
            engine.add_request(str(i), job.prompt_token_ids, job.params.replace(logprobs=0, detokenize=False))
        sums: dict[str, float] = {}
        while engine.has_unfinished_requests():
            sums |= {output.request_id: output.outputs[0].cumulative_logprob for output in engine.step()}
        return [sums[str(i)] for i in range(len(jobs))]

    contiguous = logprobs("max_model_len")
    for block_size in (1, 3, 16):
        assert logprobs(block_size) == contiguous


# --- the arithmetic, by hand ------------------------------------------------------------------------------------------


def test_slot_mapping_by_hand() -> None:
    table = BlockTable(max_num_reqs=3, max_num_blocks_per_req=4, block_size=4)
    table.add_row([7, 2], row=0)
    table.add_row([4], row=1)
    rows, positions = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 3, 4, 7, 0, 3])
    assert table.slot_mapping(rows, positions).tolist() == [28, 31, 8, 11, 16, 19]
    table.append_row([9, 1], row=0)
    assert table.slot_mapping(np.array([0, 0]), np.array([8, 15])).tolist() == [36, 7]
    assert table.table.tolist() == [[7, 2, 9, 1], [4, 0, 0, 0], [0, 0, 0, 0]]


def test_rows_are_replaced_moved_and_padded_with_the_null_block() -> None:
    table = BlockTable(max_num_reqs=2, max_num_blocks_per_req=3, block_size=2)
    table.add_row([3, 4, 5], row=0)
    table.add_row([6], row=0)  # nothing of the longer row stays
    table.append_row([], row=0)
    assert table.table[0].tolist() == [6, 0, 0] and table.num_blocks_per_row.tolist() == [1, 0]
    table.add_row([1, 2], row=1)
    table.move_row(1, 0)
    assert table.table[0].tolist() == [1, 2, 0] and table.num_blocks_per_row[0] == 2


def test_slots_of_a_large_pool_do_not_overflow() -> None:
    table = BlockTable(max_num_reqs=1, max_num_blocks_per_req=1, block_size=8192)
    table.add_row([300_000], row=0)  # 300,000 * 8,192 is beyond int32
    assert table.slot_mapping(np.array([0]), np.array([8191])).tolist() == [300_000 * 8192 + 8191]


def test_sequence_slots_by_hand() -> None:
    assert sequence_slots(torch.tensor([7, 2, 0]), 6, 4).tolist() == [28, 29, 30, 31, 8, 9]
    assert sequence_slots(torch.tensor([7, 2, 0]), 8, 4).tolist() == [28, 29, 30, 31, 8, 9, 10, 11]
    assert sequence_slots(torch.tensor([5, 3, 1], dtype=torch.int32), 3, 1).tolist() == [5, 3, 1]


def test_write_puts_every_token_into_its_slot() -> None:
    spec = AttentionSpec(2, 1, 4, torch.float32, torch.device("cpu"), block_size=4)
    backend = TorchNaiveBackend(spec)
    cache = torch.zeros(backend.kv_cache_shape(8))
    key = torch.arange(1.0, 4.0)[:, None, None].expand(3, 1, 4)  # [num_tokens, num_kv_heads, head_size]
    metadata = AttentionMetadata([0, 3], [9], torch.tensor([[7, 2, 5]]), torch.tensor([11, 20, 31]), block_size=4)
    backend.write(key, -key, cache, metadata)
    assert [cache[0, 2, 3, 0, 0], cache[0, 5, 0, 0, 0], cache[0, 7, 3, 0, 0]] == [1, 2, 3]
    assert [cache[1, 2, 3, 0, 0], cache[1, 5, 0, 0, 0], cache[1, 7, 3, 0, 0]] == [-1, -2, -3]
    assert cache.count_nonzero() == 2 * 3 * 4, "nothing else was touched"


def test_copy_blocks_in_every_layer() -> None:
    spec = AttentionSpec(2, 1, 4, torch.float32, torch.device("cpu"), block_size=4)
    backend = TorchNaiveBackend(spec)
    caches = torch.randn(3, *backend.kv_cache_shape(6))
    before = caches.clone()
    backend.copy_blocks(caches, [(1, 4), (2, 5)])
    assert torch.equal(caches[:, :, 4], before[:, :, 1]) and torch.equal(caches[:, :, 5], before[:, :, 2])
    assert torch.equal(caches[:, :, :4], before[:, :, :4])


def test_inputs_of_a_mixed_step_by_hand(tiny_model_dir: MakeTiny) -> None:
    """A decode of one request and the whole prompt of another in one flat batch."""
    engine = make_engine(tiny_model_dir("llama"), max_model_len=16, block_size=4, num_kv_blocks=20, max_num_seqs=2)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
    seen: list[AttentionMetadata] = []
    runner = runner_of(engine)
    prepare = runner.backend.prepare
    runner.backend.prepare = lambda metadata: (seen.append(metadata), prepare(metadata))[1]  # type: ignore[method-assign]
    engine.add_request("a", [10, 11, 12], params)
    engine.step()
    assert seen[-1].query_start_loc == [0, 3] and seen[-1].seq_lens == [3]
    assert seen[-1].slot_mapping.tolist() == [4, 5, 6]  # block 1: block 0 is the null block
    engine.add_request("b", [20, 21, 22, 23, 24], params)
    engine.step()
    metadata = seen[-1]
    assert metadata.query_start_loc == [0, 1, 6] and metadata.seq_lens == [4, 5]
    assert metadata.block_table.tolist() == [[1, 0, 0, 0], [2, 3, 0, 0]]
    assert metadata.slot_mapping.tolist() == [7, 8, 9, 10, 11, 12]
    assert runner.buffers.positions[:6].tolist() == [3, 0, 1, 2, 3, 4]
    assert runner.buffers.input_ids[1:6].tolist() == [20, 21, 22, 23, 24]
    engine.step()
    assert seen[-1].block_table.tolist() == [[1, 4, 0, 0], [2, 3, 0, 0]] and seen[-1].slot_mapping.tolist() == [16, 13]


# --- the batch's rows -------------------------------------------------------------------------------------------------

MAX_REQS, BATCH_LEN, BATCH_BLOCK = 4, 12, 3
OPERATIONS = st.lists(st.tuples(st.sampled_from(["add", "remove", "token", "block", "readd"]), st.integers(0, 9)))


def new_state(name: str, seed: int) -> CachedRequestState:
    prompt = list(range(10 * seed + 1, 10 * seed + 2 + seed % 4))
    data = NewRequestData(name, prompt, SamplingParams(), None, 0, [], ([],), 0)
    return CachedRequestState(data, [seed + 1], seed % 2)


def assert_as_if_rebuilt(batch: InputBatch, states: dict[str, CachedRequestState]) -> None:
    """The rows hold what a batch built from nothing out of the same states, in the same order, holds."""
    assert set(batch.req_ids) == states.keys() and batch.num_reqs == len(states)
    rebuilt = InputBatch(MAX_REQS, BATCH_LEN, BATCH_BLOCK)
    for request_id in batch.req_ids:
        rebuilt.add_request(states[request_id])
    assert batch.row_of == rebuilt.row_of and batch.req_ids == rebuilt.req_ids
    n = batch.num_reqs
    for name in ("num_tokens", "num_computed_tokens"):
        assert getattr(batch, name)[:n].tolist() == getattr(rebuilt, name)[:n].tolist()
    assert batch.block_table.table[:n].tolist() == rebuilt.block_table.table[:n].tolist()
    assert batch.block_table.num_blocks_per_row[:n].tolist() == rebuilt.block_table.num_blocks_per_row[:n].tolist()
    for row in range(n):
        length = batch.num_tokens[row]
        assert batch.token_ids[row, :length].tolist() == rebuilt.token_ids[row, :length].tolist()


@settings(max_examples=150, deadline=None)
@given(OPERATIONS)
def test_rows_changed_in_place_equal_a_batch_built_anew(operations: list[tuple[str, int]]) -> None:
    batch, states = InputBatch(MAX_REQS, BATCH_LEN, BATCH_BLOCK), {}
    left: dict[str, CachedRequestState] = {}  # out of the batch, perhaps to come back (a preemption)
    for number, (operation, pick) in enumerate(operations):
        chosen = sorted(states)[pick % len(states)] if states else None
        if operation == "add" and len(states) < MAX_REQS:
            states[f"r{number}"] = new_state(f"r{number}", pick)
            batch.add_request(states[f"r{number}"])
        elif operation == "readd" and left and len(states) < MAX_REQS:
            name, state = left.popitem()
            states[name] = state
            batch.add_request(state)
        elif operation == "remove":
            batch.remove_request(chosen or "nobody")
            if chosen is not None:
                left[chosen] = states.pop(chosen)
        elif operation == "token" and chosen is not None and states[chosen].num_tokens < BATCH_LEN:
            states[chosen].output_token_ids.append(pick)
            batch.append_token(chosen, pick)
        elif operation == "block" and chosen is not None and len(states[chosen].block_ids) < BATCH_LEN // BATCH_BLOCK:
            states[chosen].block_ids += [pick + 20]
            batch.block_table.append_row([pick + 20], batch.row_of[chosen])
        assert_as_if_rebuilt(batch, states)


DOUBLED_TABLE = """
from folovllm.worker.block_table import BlockTable

class Doubled(BlockTable):
    def slot_mapping(self, rows, positions):
        return 2 * super().slot_mapping(rows, positions)
"""


def test_a_learners_block_table_gives_the_slots(tiny_model_dir: MakeTiny, tmp_path: Path) -> None:
    """The input batch builds its table as the part worker.block_table."""
    (tmp_path / "mine.py").write_text(DOUBLED_TABLE)
    parts = {"worker.block_table": f"{tmp_path}/mine.py:Doubled"}
    engine = make_engine(tiny_model_dir("llama"), max_model_len=MAX_MODEL_LEN, block_size=4, parts=parts)
    table = runner_of(engine).batch.block_table
    table.add_row([7, 2], row=0)
    assert table.slot_mapping(np.array([0, 0]), np.array([3, 4])).tolist() == [2 * 31, 2 * 8]


def test_the_batch_equals_the_requests_at_every_step(
    tiny_model_dir: MakeTiny, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real run with preemptions, too: what the rows say is what the scheduler says."""
    engine = make_engine(
        tiny_model_dir("llama"), max_model_len=MAX_MODEL_LEN, max_num_seqs=4, block_size=5, num_kv_blocks=14
    )
    runner, scheduler, checks = runner_of(engine), engine.engine_core.scheduler, []
    prepare = runner._prepare_inputs

    def check_and_prepare(output: Any) -> Any:
        batch = runner.batch
        assert set(batch.req_ids) == set(output.num_scheduled_tokens)
        for row, request_id in enumerate(batch.req_ids):
            request = scheduler.requests[request_id]
            assert batch.token_ids[row, : batch.num_tokens[row]].tolist() == request.all_token_ids
            (block_ids,) = scheduler.kv_cache_manager.get_block_ids(request_id)
            assert batch.block_table.table[row, : len(block_ids)].tolist() == block_ids
            assert runner.requests[request_id].block_ids == block_ids
            done = batch.num_computed_tokens[row] + output.num_scheduled_tokens[request_id]
            assert done == request.num_computed_tokens  # the scheduler has counted this step already
            checks.append(request_id)
        return prepare(output)

    monkeypatch.setattr(runner, "_prepare_inputs", check_and_prepare)
    assert run_jobs(engine, jobs, late=3) == tokens_of(jobs)
    assert len(checks) > 100 and engine.stats().num_preemptions > 0
