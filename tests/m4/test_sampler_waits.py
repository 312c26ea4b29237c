"""On a GPU, a sampling step makes the host wait once, for the ids and everything else that it has to know (R4.58).

Milestone: M4. The GPU is the stand-in of tests/fake_gpu.py, on which everything raises that waits without saying so.
What the steps compute is compared elsewhere; here are the operators that a CPU leaves to a GPU, run on a CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from folovllm.sample import logprobs
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.ops import topk_topp
from folovllm.sample.sampler import LOGPROBS_MODES, LogprobsMode, Sampler, SamplerBackend, SamplerOutput
from folovllm.sampling_params import SamplingParams
from tests.fake_gpu import GPU, FakeGpu, HiddenWait, fake_gpu
from tests.m4.test_sampler_shortlist import KINDS, make_logits

pytestmark = pytest.mark.m4

VOCAB_SIZE = 4096
GREEDY: dict[str, Any] = {"temperature": 0.0}
TRUNCATED: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.02}
EVERYTHING: dict[str, Any] = {
    **TRUNCATED,
    "repetition_penalty": 1.2,
    "logit_bias": {7: 2.0},
    "allowed_token_ids": [5, 6, 7, 9],
    "min_tokens": 3,
    "logprobs": 2,
}

# The parameters of the rows, and how many copies to the GPU they cost at most. A batch that draws has its numbers, the
# keys of its noise, and its top_k. What some rows have for themselves comes on top.
BATCHES: dict[str, tuple[list[dict[str, Any]], int]] = {
    "greedy": ([GREEDY] * 3, 0),
    "temperature": ([{"temperature": 0.8}] * 3, 2),
    "top_k": ([{"top_k": 50}] * 3, 3),
    "top_p": ([{"top_p": 0.9}] * 3, 2),
    "min_p": ([{"min_p": 0.1}] * 3, 2),
    "all three": ([TRUNCATED] * 3, 3),
    "some rows truncated, some not, some greedy": ([TRUNCATED, {}, GREEDY], 5),
    "penalties": ([{**GREEDY, "repetition_penalty": 1.2, "presence_penalty": 0.5}, GREEDY], 2),
    "min_tokens": ([{**GREEDY, "min_tokens": 3}, GREEDY], 1),
    "logit_bias": ([{**GREEDY, "logit_bias": {7: 2.0, 9: -1.0}}, GREEDY], 2),
    "allowed ids": ([{**GREEDY, "allowed_token_ids": [5, 7]}, GREEDY], 2),
    "logprobs of all rows": ([{**GREEDY, "logprobs": k} for k in (0, 2, 5)], 0),
    "logprobs of some rows": ([{**GREEDY, "logprobs": 2}, GREEDY, {"temperature": 0.5, "logprobs": 0}], 3),
    "everything": ([EVERYTHING, {}, {**GREEDY, "logprobs": 0}, TRUNCATED], 13),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


def make_sampler(backend: SamplerBackend, mode: LogprobsMode = "raw_logprobs") -> Sampler:
    sampler = Sampler(mode)
    sampler.use_backend(backend)
    return sampler


def rows_of(batch: list[dict[str, Any]], bad_words: bool = False) -> list[SamplingRow]:
    words = [[6], [5, 8]] if bad_words else []
    return [SamplingRow(SamplingParams(**p), [3, 4], [5], 2, seed, words) for seed, p in enumerate(batch)]


def a_step(sampler: Sampler, rows: list[SamplingRow], vocab_size: int = VOCAB_SIZE) -> SamplerOutput:
    logits = torch.empty(len(rows), vocab_size, dtype=torch.bfloat16, device=GPU)
    return sampler(logits, SamplingMetadata.build(rows, vocab_size, GPU))


# ---- what a step copies, and when it waits


@pytest.mark.parametrize("vocab_size", [100, 1001, VOCAB_SIZE])  # shorter than the list, odd, long
@pytest.mark.parametrize("backend", ["torch", "shortlist"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_step_waits_once(gpu: FakeGpu, name: str, backend: SamplerBackend, vocab_size: int) -> None:
    batch, copies = BATCHES[name]
    with gpu.step() as account:
        output = a_step(make_sampler(backend), rows_of(batch), vocab_size)
    assert account.waits == 1 and len(account.up) <= copies, account.up
    assert len(output.sampled_token_ids) == len(batch)
    counts = [None if one is None else len(one.token_ids) - 1 for one in output.logprobs]
    assert counts == [p.get("logprobs") for p in batch]


def test_bad_words_cost_one_copy(gpu: FakeGpu) -> None:
    with gpu.step() as account:
        a_step(make_sampler("shortlist"), rows_of([GREEDY] * 3, bad_words=True))
    assert account.waits == 1 and account.up == [(6, 2)]  # two words of each row


@pytest.mark.parametrize("backend", ["torch", "shortlist"])
@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_logprobs_come_with_the_ids(gpu: FakeGpu, mode: LogprobsMode, backend: SamplerBackend) -> None:
    rows = rows_of([EVERYTHING, {"logprobs": 3}, {**GREEDY, "logprobs": 0}], bad_words=True)
    with gpu.step() as account:
        a_step(make_sampler(backend, mode), rows)
    assert account.waits == 1
    assert account.down == [(3,), (3, 4), (3, 4), (3,)]  # the ids; 1 + 3 ids and logprobs per row, and the ranks


def test_logprobs_of_a_prompt_wait_once(gpu: FakeGpu) -> None:
    with gpu.step() as account:
        values = torch.empty(150, VOCAB_SIZE, device=GPU)  # ranked in three groups
        ranked = logprobs.rank_logprobs(values, torch.zeros(150, dtype=torch.int64, device=GPU), [2] * 150)
        got = logprobs.logprobs_to_host(ranked)
    assert account.waits == 1 and account.up == [] and len(got) == 150


def test_rows_without_a_proof_cost_a_second_wait(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    download = gpu.download
    told = []

    def undecided(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        ids, *rest = download(tensors)
        told.append(len(ids))
        return [torch.tensor([-1, 5, -1]) if len(told) == 1 else torch.tensor([3, 5, 4]), *rest]

    monkeypatch.setattr("folovllm.transfers._download", undecided)
    with gpu.step() as account:
        output = a_step(make_sampler("shortlist"), rows_of([{**TRUNCATED, "logprobs": 1}, TRUNCATED, TRUNCATED]))
    assert account.waits == 2 and output.sampled_token_ids == [3, 5, 4]
    assert account.down == [(3,), (1, 2), (1, 2), (1,)] * 2


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("greedy_sample", lambda logits, result: result + result.max().item()),
        ("greedy_sample", lambda logits, result: result[[0, 1, 2]]),
        ("random_sample", lambda probs, result: result.cpu().to(GPU)),
        ("random_sample", lambda probs, result: torch.where(probs.isnan().any(), torch.tensor(0, device=GPU), result)),
        ("compute_logprobs", lambda logits, result: result[result.isfinite().all(dim=-1)]),
    ],
)
def test_a_planted_wait_is_found(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, where: str, fault: Callable[..., torch.Tensor]
) -> None:
    original = Sampler.__dict__[where]
    is_static = isinstance(original, staticmethod)

    def faulty(*args: Any) -> torch.Tensor:
        result = original(*args)
        return fault(args[0 if is_static else 1], result)

    monkeypatch.setattr(Sampler, where, staticmethod(faulty) if is_static else faulty)
    with gpu.step(), pytest.raises((HiddenWait, DataDependentOutputException, DynamicOutputShapeException)):
        a_step(make_sampler("torch"), rows_of([{"logprobs": 1}, GREEDY, GREEDY]))


# ---- what a GPU runs instead, on a CPU


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [5, 1000, 4096])
def test_top_p_of_all_rows_is_top_p_of_each_row(kind: str, vocab_size: int) -> None:
    top_p = torch.tensor([1.0, 0.999999, 0.95, 0.9, 0.5, 0.25, 0.01, 1e-9, 1.0])
    each = make_logits(kind, len(top_p), vocab_size, 3)
    together = each.clone()
    topk_topp._top_p_of_each_row_(each, top_p)
    topk_topp._top_p_of_all_rows_(together, top_p)
    assert torch.equal(each, together)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.sampled_from([5, 100, 1024, 4096]),
    k=st.sampled_from([1, 2, 5, 20, 100]),
    seed=st.integers(0, 1000),
)
def test_the_most_likely_by_key_are_in_order_of_value_then_id(kind: str, vocab_size: int, k: int, seed: int) -> None:
    values, k = make_logits(kind, 4, vocab_size, seed), min(k, vocab_size)
    expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(logprobs._most_likely_by_key(values, k), expected)


def test_keys_sort_every_kind_of_float() -> None:
    inf = float("inf")
    row = torch.tensor([[-0.0, 0.0, 1e-40, -1e-40, -inf, inf, 1.5, -1.5, 3e38, -3e38]])
    assert logprobs._most_likely_by_key(row, 10).tolist() == [[5, 8, 6, 2, 0, 1, 3, 7, 9, 4]]  # 0.0 equals -0.0: by id


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every turn that the code takes where the device is no CPU."""
    monkeypatch.setattr(topk_topp, "_top_p_of_each_row_", topk_topp._top_p_of_all_rows_)
    monkeypatch.setattr(logprobs, "_most_likely_on_cpu", logprobs._most_likely_by_key)
    monkeypatch.setattr("folovllm.sample.sampler._row_groups", lambda logits, n=None: [slice(0, n or len(logits))])


@pytest.mark.parametrize("backend", ["torch", "shortlist"])
@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_the_turns_of_a_gpu_lead_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, mode: LogprobsMode, backend: SamplerBackend
) -> None:
    """Flat rows and ties, which the shortlist cannot prove, beside peaked rows, all with logprobs."""
    settings_ = [TRUNCATED, {"top_p": 0.95}, {}, GREEDY, {"top_k": 400}, {"min_p": 1e-6}]
    batch = [{**settings_[i % len(settings_)], "logprobs": i % 5} for i in range(2 * len(KINDS))]
    values = torch.cat([make_logits(kind, 2, VOCAB_SIZE, 9) for kind in KINDS])
    metadata = SamplingMetadata.build(rows_of(batch), VOCAB_SIZE, "cpu")
    expected = Sampler(mode).forward(values, metadata)
    again: list[int] = []
    original = Sampler.sample_again_

    def counted(self: Sampler, sampled: torch.Tensor, *rest: Any) -> None:
        again.extend(rest[-1])
        original(self, sampled, *rest)

    monkeypatch.setattr(Sampler, "sample_again_", counted)
    as_on_a_gpu(monkeypatch)
    assert make_sampler(backend, mode).forward(values, metadata) == expected
    assert (len(again) > 3) == (backend == "shortlist"), "rows are drawn again, and their logprobs come again"
