"""The C++ sampling operator against the definition of M1: the same tokens and the same bits (R4.24 to R4.26).

The oracle is that of test_sampler_shortlist.py: softmax, full stable sort, full race, one row after the other. What the
operator calls doubtful must be rare, left untouched, and answered by the torch way behind it.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.ops import fused
from folovllm.sample.ops.noise import exponential_noise
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import SamplingParams
from tests.m0.test_sampling_params import cases
from tests.m4.test_sampler_shortlist import KINDS, make_logits, shortlist_sampler
from tests.m4.test_sampler_shortlist import check as check_sampler

pytestmark = pytest.mark.m4

INF, NAN = math.inf, math.nan
SIZES = [1, 2, 5, 15, 16, 17, 255, 256, 1000, 3001, 4096]  # around the 16 lanes of a vector, and what is no multiple


def metadata_of(params: list[SamplingParams], vocab_size: int, seed: int = 0) -> SamplingMetadata:
    rows = [SamplingRow(p, [], [], None, seed + i, []) for i, p in enumerate(params)]
    return SamplingMetadata.build(rows, vocab_size, "cpu")


def answers(ops: Any, logits: torch.Tensor, params: list[SamplingParams], seed: int = 0) -> list[int]:
    """What the operator says of each row of `logits [R, V]`; -1 is doubt. Edits them."""
    drawn = fused.sample_(logits, metadata_of(params, logits.shape[1], seed), ops)
    assert drawn is not None
    return drawn.tolist()


def cpp_sampler(ops: Any) -> Sampler:
    sampler = Sampler()
    sampler.use_backend("cpp", ops)
    return sampler


def check(ops: Any, logits: torch.Tensor, params: list[SamplingParams], seed: int) -> None:
    check_sampler(logits, params, seed, cpp_sampler(ops))


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the rows that go the torch way, as they do."""
    went: list[int] = []
    original = Sampler.sample_again_

    def counted(
        self: Sampler, sampled: torch.Tensor, logits: torch.Tensor, metadata: SamplingMetadata, rows: list[int]
    ) -> None:
        went.extend(rows)
        original(self, sampled, logits, metadata, rows)

    def refuse(*_: Any) -> None:
        raise AssertionError("C++ did not take the batch")

    monkeypatch.setattr(Sampler, "sample_again_", counted)
    monkeypatch.setattr(Sampler, "_sample_from_list", refuse)
    yield went


# ---- equal to the definition

a_setting = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.01, 0.3, 0.8, 0.8, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 2, 16, 50, 257, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999999, 0.95, 0.95, 0.9, 0.5, 0.25, 0.01, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 1e-30, 1e-6, 0.01, 0.1, 1.0]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    settings_=st.lists(a_setting, min_size=1, max_size=9),
    kinds=st.lists(st.sampled_from(KINDS), min_size=9, max_size=9),
    vocab_size=st.sampled_from(SIZES),
    seed=st.integers(0, 10**6),
)
def test_tokens_and_logits_equal_the_definition(
    ops: Any, settings_: list[dict[str, Any]], kinds: list[str], vocab_size: int, seed: int
) -> None:
    n = len(settings_)
    logits = torch.cat([make_logits(kind, 1, vocab_size, seed + i) for i, kind in enumerate(kinds[:n])])
    check(ops, logits, [SamplingParams(**s) for s in settings_], seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "setting",
    [{"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.05}, {"top_p": 0.9, "top_k": 40, "min_p": 0.02}, {}],
)
def test_a_real_vocabulary(ops: Any, kind: str, setting: dict[str, Any], in_torch: list[int]) -> None:
    check(ops, make_logits(kind, 2, 49_152, 7), [SamplingParams(**{"temperature": 0.8, **setting})] * 2, 11)
    assert in_torch == []


@pytest.mark.parametrize(("name", "value"), cases(0))
def test_every_parameter_means_the_same_to_every_backend(ops: Any, name: str, value: Any) -> None:
    """A parameter that only the torch path knows would be ignored here (ops/fused.py)."""
    logits = make_logits("normal", 40, 1000, 0)
    row = {"logprobs": 5} | {name: value}
    metadata = metadata_of([SamplingParams(**row)] * 40, 1000)
    samplers = (Sampler(), shortlist_sampler(), cpp_sampler(ops))
    torch_way, *others = (sampler.forward(logits, metadata) for sampler in samplers)
    assert all(other == torch_way for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thousands_of_flat_rows_hardly_ever_in_doubt(ops: Any, dtype: torch.dtype, in_torch: list[int]) -> None:
    """After a random prompt: the nucleus is a third of the vocabulary, and in bf16 its edge lies among equals."""
    g = torch.Generator().manual_seed(3)
    for start in range(0, 2000, 250):
        logits = (torch.randn(250, 4096, generator=g) * 1.5 + 12).to(dtype)  # [250, V]
        check(ops, logits, [SamplingParams(temperature=0.8, top_p=0.95)] * 250, start)
    assert len(in_torch) < 10


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(ops: Any, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(ops, make_logits("normal", 7, 4096, 5), [SamplingParams(temperature=0.8, top_p=0.95)] * 7, 3)
    finally:
        torch.set_num_threads(before)


# ---- doubt


def test_a_sum_on_the_edge_of_rounding_goes_the_torch_way(ops: Any, in_torch: list[int]) -> None:
    """Of three tokens the lower two sum to half-way between two float32; the limit is the lower of these."""
    g = torch.Generator().manual_seed(0)
    doubted = 0
    for seed in range(400):
        logits = torch.randn(1, 3, generator=g) * 0.3
        edge = logits.softmax(-1).sort().values[0, :2].double().sum()  # above 1/2, where floats are 2^-24 apart
        limit = torch.nextafter(edge.float(), torch.tensor(0.0))
        params = [SamplingParams(temperature=1.0, top_p=1 - limit.item())]
        half_way = edge > 0.5 and edge.item() - limit.item() == 2.0**-25
        if half_way:
            assert answers(ops, logits.clone(), params, seed) == [-1]
            doubted += 1
        check(ops, logits, params, seed)
    assert doubted > 10 and len(in_torch) >= doubted


@pytest.mark.parametrize("vocab_size", [2, 100])
def test_a_race_won_by_a_hair_goes_the_torch_way(ops: Any, vocab_size: int) -> None:
    """Probabilities in proportion to the noise: every clock rings at the same time, up to rounding."""
    for seed in range(20):
        logits = exponential_noise([seed], [0], vocab_size, "cpu").log()  # [1, V]
        params = [SamplingParams(temperature=1.0)]
        assert answers(ops, logits.clone(), params, seed) == [-1]
        check(ops, logits, params, seed)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_without_probabilities_is_left_alone_and_its_mates_are_answered(ops: Any, value: float) -> None:
    logits = make_logits("normal", 3, 1000, 0)
    if value == -INF:
        logits[1] = -INF
    else:
        logits[1, 999] = value  # beyond the last whole vector
    params = [SamplingParams(temperature=0.8, top_p=0.9)] * 3
    edited = logits.clone()
    first, middle, last = answers(ops, edited, params)
    assert middle == -1 and min(first, last) >= 0
    assert edited[1].view(torch.int32).tolist() == logits[1].view(torch.int32).tolist()  # NaN is not equal to NaN
    mates = logits[[0, 2]]
    assert [first] == answers(ops, mates[:1], params[:1], 0) and [last] == answers(ops, mates[1:], params[:1], 2)


@pytest.mark.parametrize("value", [NAN, INF])
def test_the_sampler_answers_such_a_row_as_it_does_in_torch(ops: Any, value: float) -> None:
    logits = make_logits("normal", 3, 1000, 0)
    logits[1, 7] = value
    metadata = metadata_of([SamplingParams(temperature=0.8)] * 3, 1000)
    assert cpp_sampler(ops).forward(logits, metadata) == Sampler().forward(logits, metadata)


# ---- by hand, and at the edges


def test_the_example_of_top_p(ops: Any) -> None:
    """p 0.7 of [0.5, 0.3, 0.15, 0.05]: 0.05 and 0.15 go, as topk_topp.apply_top_p_ says."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert answers(ops, logits, [SamplingParams(temperature=1.0, top_p=0.7)])[0] in (0, 1)
    assert (logits > -INF).tolist() == [[True, True, False, False]]


def test_of_equals_the_higher_ids_stay_in_top_p_and_all_of_them_in_the_others(ops: Any) -> None:
    logits = torch.zeros(4, 40)
    truncations: list[dict[str, Any]] = [{"top_p": 0.5}, {"top_p": 1e-9}, {"top_k": 3}, {"min_p": 1.0}]
    assert min(answers(ops, logits, [SamplingParams(temperature=1.0, **t) for t in truncations])) >= 0
    half, one, *others = logits > -INF
    assert half.nonzero().flatten().tolist() == list(range(20, 40)) and one.nonzero().flatten().tolist() == [39]
    assert all(kept.all() for kept in others)


def test_greedy_rows_are_not_touched(ops: Any) -> None:
    logits = make_logits("normal", 2, 300, 0)
    edited = logits.clone()
    answers(ops, edited, [SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, top_p=0.5)])
    assert torch.equal(edited[0], logits[0]) and not torch.equal(edited[1], logits[1])


def test_without_the_operator_nothing_is_done(ops: Any) -> None:
    logits = make_logits("normal", 5, 1000, 0)
    params = [SamplingParams(temperature=0.8, top_p=0.9)] * 5
    metadata = metadata_of(params, 1000)
    for unfit in (logits.bfloat16(), logits.t().contiguous().t()):
        edited = unfit.clone(memory_format=torch.preserve_format)
        assert fused.sample_(edited, metadata, ops) is None and torch.equal(edited, unfit)
    assert Sampler().forward(logits, metadata) == cpp_sampler(ops).forward(logits, metadata)


def test_bad_inputs_are_errors_and_not_crashes(ops: Any) -> None:
    logits, one = torch.zeros(2, 8), torch.ones(2)
    keys = torch.zeros(2, dtype=torch.int64)
    for args in (
        (logits[0], one, None, None, None, keys),
        (logits.double(), one, None, None, None, keys),
        (logits[:, ::2], one, None, None, None, keys),
        (logits, one[:1], None, None, None, keys),
        (logits, one, None, one, None, keys),  # top_k is int64
        (logits, one, None, None, one, keys[:1]),
    ):
        with pytest.raises(RuntimeError):
            ops.sample_(*args)
    assert ops.sample_(logits[:0], one[:0], None, None, None, keys[:0]).tolist() == []
