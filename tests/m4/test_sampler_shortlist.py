"""The shortlist of M4 against the definition of M1: the same tokens and the same bits, and no work that is not needed.

This is the torch way, so the C++ operator (test_cpp_sampling.py) is switched off here.

The oracle below is the plain chain on the full vocabulary: softmax, full stable sort, full race. It shares with the
code under test only the noise, which has its own tests.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.sample.logprobs import logprobs_to_host, rank_logprobs
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.ops import topk_topp
from folovllm.sample.ops.noise import exponential_noise
from folovllm.sample.ops.penalties import apply_penalties_, build_penalties
from folovllm.sample.ops.select import first_argmax, largest
from folovllm.sample.ops.shortlist import SHORTLIST_SIZE, Shortlist
from folovllm.sample.sampler import LogprobsMode, Sampler
from folovllm.sampling_params import SamplingParams

pytestmark = pytest.mark.m4

INF = math.inf
KINDS = ["normal", "flat", "peaked", "ties", "bf16", "all equal", "two values", "masked", "almost empty", "huge"]


def shortlist_sampler(mode: LogprobsMode = "raw_logprobs") -> Sampler:
    sampler = Sampler(mode)
    sampler.use_backend("shortlist")
    return sampler


def make_logits(kind: str, rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """`[rows, vocab_size]` float32 of the given kind."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab_size, generator=g)
    if kind == "masked":
        return x.masked_fill(torch.rand(rows, vocab_size, generator=g) < 0.9, -INF).index_fill(
            1, torch.tensor([0]), 0.0
        )
    if kind == "almost empty":
        return torch.full_like(x, -INF).index_copy(1, torch.arange(min(3, vocab_size)), x[:, :3])
    return {
        "normal": lambda: x * 2,
        "flat": lambda: x * 0.01,
        "peaked": lambda: x * 8,
        "ties": lambda: (x * 4).round() / 2,
        "bf16": lambda: (x * 3 + 15).bfloat16().float(),
        "all equal": lambda: torch.zeros_like(x),
        "two values": lambda: (x > 2).float() * 4,
        "huge": lambda: x * 1e30,
    }[kind]()


def oracle(logits: torch.Tensor, rows: list[SamplingParams], seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens `[R]`, logits after all steps `[R, V]`), one row after the other, nothing clever."""
    after = []
    for x, p in zip(logits.float(), rows, strict=True):
        if p.is_greedy:
            after.append(x)
            continue
        x = x / torch.tensor(p.temperature)
        if p.min_p > 0:
            probs = x.softmax(-1)
            x = x.masked_fill(probs < torch.tensor(p.min_p) * probs.max(), -INF)
        if 0 < p.top_k < len(x):
            x = x.masked_fill(x < x.sort(descending=True).values[p.top_k - 1], -INF)
        if p.top_p < 1:
            probs, order = x.softmax(-1).sort(stable=True)
            gone = probs.cumsum(-1) <= 1 - torch.tensor(p.top_p)
            gone[-1] = False
            x = x.masked_fill(torch.zeros_like(gone).scatter(0, order, gone), -INF)
        after.append(x)
    processed = torch.stack(after)
    race = (processed.softmax(-1) / exponential_noise(seeds, [0] * len(rows), logits.shape[1], "cpu")).argmax(-1)
    greedy = torch.tensor([p.is_greedy for p in rows])
    return torch.where(greedy, logits.float().argmax(-1), race), processed


def sample_twice(sampler: Sampler, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """The two halves of the draw, as `forward` runs them: on the device, and then what the host finds to be missing."""
    before = logits.clone()
    drawn = sampler.sample(logits, metadata)
    missing = (drawn < 0).nonzero().flatten().tolist()
    assert torch.equal(logits[missing], before[missing]), "a row that is not decided has changed"
    sampler.sample_again_(drawn, logits, metadata, missing)
    return drawn


def check(logits: torch.Tensor, params: list[SamplingParams], seed: int, sampler: Sampler | None = None) -> None:
    seeds = list(range(seed, seed + len(params)))
    rows = [SamplingRow(p, [], [], None, s, []) for p, s in zip(params, seeds, strict=True)]
    metadata = SamplingMetadata.build(rows, logits.shape[1], "cpu")
    ours = logits.float().clone()
    # In this mode, the steps leave the logits as they have changed them.
    drawn = sample_twice(sampler or shortlist_sampler("processed_logits"), ours, metadata)
    tokens, processed = oracle(logits, params, seeds)
    assert drawn.tolist() == tokens.tolist()
    random = [i for i, p in enumerate(params) if not p.is_greedy]
    assert torch.equal(ours[random], processed[random])


a_setting = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.01, 0.3, 0.8, 0.8, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 2, 50, SHORTLIST_SIZE - 1, SHORTLIST_SIZE, SHORTLIST_SIZE + 1, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999999, 0.95, 0.95, 0.9, 0.5, 0.25, 0.01, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 1e-6, 0.01, 0.1, 1.0]),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    settings_=st.lists(a_setting, min_size=1, max_size=9),
    kinds=st.lists(st.sampled_from(KINDS), min_size=9, max_size=9),
    vocab_size=st.sampled_from([5, 255, 256, 257, 1000, 4096, 8192, 12_288]),
    seed=st.integers(0, 10**6),
)
def test_tokens_and_logits_equal_the_definition(
    settings_: list[dict[str, Any]], kinds: list[str], vocab_size: int, seed: int
) -> None:
    n = len(settings_)
    logits = torch.cat([make_logits(kind, 1, vocab_size, seed + i) for i, kind in enumerate(kinds[:n])])
    params = [SamplingParams(**s) for s in settings_]
    for sampler in (shortlist_sampler("processed_logits"), Sampler()):  # and the textbook path
        check(logits, params, seed, sampler)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "setting",
    [
        {"top_p": 0.95},
        {"top_k": 50},
        {"min_p": 0.05},
        {"top_p": 0.9, "top_k": 40, "min_p": 0.02},
        {"top_p": 0.5, "temperature": 3.0},
        {},
    ],
)
def test_a_real_vocabulary(kind: str, setting: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 0.8, **setting})
    check(make_logits(kind, 4, 49_152, 7), [params] * 4, 11)


def test_two_thousand_peaked_rows_with_ties() -> None:
    """The common case, often: bf16 logits with a Zipf-like head, whose crossing lies among equals."""
    g = torch.Generator().manual_seed(3)
    head = 14 - 1.5 * torch.arange(1, 4097).float().log()  # [V]
    for start in range(0, 2000, 250):
        noise = torch.randn(250, 4096, generator=g) * 0.3
        logits = (head + noise)[:, torch.randperm(4096, generator=g)].bfloat16()  # [250, V]
        check(logits, [SamplingParams(temperature=0.8, top_p=0.95)] * 250, start)


def count_long_rows(logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **setting: Any) -> dict[str, int]:
    """How many rows each step could not decide on the shortlist."""
    counts: dict[str, int] = {}
    for name in ("apply_min_p_", "apply_top_k_", "apply_top_p_", "exponential_noise"):
        original = getattr(Sampler, name)

        def counted(values: Any, *rest: Any, name: str = name, original: Any = original) -> Any:
            counts[name] = counts.get(name, 0) + len(values)
            return original(values, *rest)

        monkeypatch.setattr(Sampler, name, staticmethod(counted))
    rows = [SamplingRow(SamplingParams(temperature=0.8, **setting), [], [], None, i, []) for i in range(len(logits))]
    shortlist_sampler().forward(logits, SamplingMetadata.build(rows, logits.shape[1], "cpu"))
    return counts


@pytest.mark.parametrize("setting", [{"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.9}])
def test_peaked_rows_never_take_the_long_way(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_long_rows(make_logits("peaked", 32, 8192, 0), monkeypatch, **setting) == {}


def test_only_the_rows_that_need_it_take_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.cat([make_logits("peaked", 6, 8192, 0), make_logits("flat", 2, 8192, 0)])
    assert count_long_rows(logits, monkeypatch, top_p=0.95) == {"apply_top_p_": 2, "exponential_noise": 2}


def test_rows_that_nothing_truncates_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch where other rows are truncated. They draw from all tokens, and the host knows which rows these are."""
    params = [SamplingParams(temperature=t, top_p=p) for t, p in [(0.8, 0.9), (0.8, 1.0), (0.0, 0.5), (2.0, 1.0)]] * 4
    rows = [SamplingRow(p, [], [], None, i, []) for i, p in enumerate(params)]
    monkeypatch.setattr("folovllm.sample.sampler._GROUP_ELEMENTS", 3 * 8192)  # groups of 3 rows
    logits = make_logits("peaked", 16, 8192, 1)
    metadata = SamplingMetadata.build(rows, 8192, "cpu")
    drawn = shortlist_sampler().sample(logits.clone(), metadata)
    assert metadata.untruncated == [1, 3, 5, 7, 9, 11, 13, 15]
    assert drawn.tolist() == oracle(logits, params, list(range(16)))[0].tolist(), "no row is drawn again"


@pytest.mark.parametrize("number", [{"top_p": 1 - 1e-9}, {"min_p": 1e-60}])
def test_numbers_that_float32_rounds_to_off_are_off(number: dict[str, float]) -> None:
    """The steps compare in float32. A row for which the host takes a step for on would be drawn twice, always."""
    params = [SamplingParams(**number), SamplingParams(top_p=0.9)]
    rows = [SamplingRow(p, [], [], None, 0, []) for p in params]
    assert SamplingMetadata.build(rows, 100, "cpu").untruncated == [0]
    assert not SamplingMetadata.build(rows[:1], 100, "cpu").truncates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.999, 0.95, 0.5, 0.001])
def test_top_p_by_buckets_equals_sorting(kind: str, top_p: float) -> None:
    for row, probs in enumerate(make_logits(kind, 20, 3000, 5).softmax(-1)):
        limit = 1 - torch.tensor(top_p)
        by_buckets = topk_topp._nucleus(probs, limit)
        by_sorting = topk_topp.nucleus_by_sorting(probs, limit)
        assert by_buckets is None or torch.equal(by_buckets, by_sorting), row


def test_flat_rows_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("sorted a whole row")

    monkeypatch.setattr(topk_topp, "nucleus_by_sorting", refuse)
    logits = make_logits("normal", 32, 8192, 1)
    topk_topp.apply_top_p_(logits, torch.full((32,), 0.95))
    assert (logits > -INF).any(dim=-1).all() and (logits == -INF).any(dim=-1).all()


def test_a_sum_on_the_edge_of_rounding_is_not_sure() -> None:
    limit = torch.tensor(0.05)  # float32
    half_ulp = 2.0**-29 * 0.5  # floats near 0.05 are 2^-28 apart
    edge = limit.double() + 2 * half_ulp  # rounds to the limit below, to its successor above
    mass = torch.stack([limit.double() / 2, edge - 1e-13, edge, edge + 1e-13, limit.double() * 2])
    exceeds, sure = topk_topp.mass_exceeds(mass, limit)
    assert sure.tolist() == [True, False, False, False, True]
    assert exceeds[0].item() is False and exceeds[-1].item() is True


def test_the_buckets_leave_the_edge_of_rounding_to_sorting() -> None:
    # From below: 2^-25, + 1/4, + 1/4 = 1/2 + 2^-25, half-way between two float32: it rounds to 1/2, which is not above.
    probs = torch.tensor([0.5 - 2.0**-25, 0.25, 2.0**-25, 0.25])
    assert topk_topp._nucleus(probs, torch.tensor(0.5)) is None
    assert topk_topp.nucleus_by_sorting(probs, torch.tensor(0.5)).tolist() == [True, False, False, False]
    assert topk_topp._nucleus(probs, torch.tensor(0.4)) is not None


def test_a_row_that_is_not_proven_stays_as_it_is() -> None:
    logits = torch.cat([make_logits("peaked", 1, 8192, 0), make_logits("flat", 1, 8192, 0)])
    shortlist = Shortlist.build(logits)
    flat = logits[1].clone()
    shortlist.apply_top_p_(logits, torch.tensor([0.95, 0.95]))
    assert shortlist.usable.tolist() == [True, False] and shortlist.closed.tolist() == [True, False]
    shortlist.apply_top_k_(logits, torch.tensor([5, 5]), 5)  # top_k alone could be proven
    assert shortlist.usable.tolist() == [True, False] and torch.equal(logits[1], flat)
    assert shortlist.random_sample(logits.softmax(-1), [0, 0], [0, 0]).tolist()[1] == -1


def test_a_row_that_no_step_has_closed_is_not_drawn_from_the_list() -> None:
    logits = make_logits("peaked", 2, 8192, 0)
    drawn = Shortlist.build(logits, untruncated=[1]).random_sample(logits.softmax(-1), [0, 1], [0, 0])
    assert drawn[0] == -1 and drawn[1] >= 0


# ---- select


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 5, 64, 100, 128, 1024, 3000, 4096, 49_152]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_first_argmax_is_argmax(kind: str, size: int, seed: int, dtype: torch.dtype) -> None:
    values = make_logits(kind, 3, size, seed).to(dtype)
    assert torch.equal(first_argmax(values), values.argmax(dim=-1))


def test_first_argmax_of_a_row_with_nan_and_of_no_rows() -> None:
    values = torch.zeros(2, 2048)
    values[0, 1500] = math.nan
    values[1] = -INF
    assert first_argmax(values).tolist() == [1500, 0]
    assert first_argmax(torch.zeros(0, 2048)).shape == (0,)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([64, 100, 1024, 8192, 49_152]),
    k=st.sampled_from([1, 2, 16, 64, 256]),
    seed=st.integers(0, 1000),
)
def test_largest_is_topk(kind: str, size: int, k: int, seed: int) -> None:
    values = make_logits(kind, 3, size, seed)
    k = min(k, size)
    top, ids = largest(values, k)
    assert torch.equal(top, values.topk(k, dim=-1).values)
    assert torch.equal(values.gather(1, ids), top)
    assert all(len(set(row)) == k for row in ids.tolist())  # k different places, however many are equal


def test_the_list_is_in_the_order_of_ids_and_closed_where_nothing_else_is_possible() -> None:
    logits = torch.cat([make_logits("normal", 1, 4096, 0), make_logits("almost empty", 1, 4096, 0)])
    shortlist = Shortlist.build(logits)
    assert (shortlist.ids.diff(dim=-1) > 0).all()
    assert shortlist.closed.tolist() == [False, True]


# ---- groups of rows, penalties, logprobs


def test_rows_in_groups_get_what_they_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.cat([make_logits(kind, 2, 1024, 9) for kind in KINDS])
    params = [SamplingParams(temperature=0.8, top_p=0.9, min_p=0.001, logprobs=3)] * len(logits)
    rows = [SamplingRow(p, [], [], None, i, []) for i, p in enumerate(params)]
    whole = shortlist_sampler().forward(logits, SamplingMetadata.build(rows, 1024, "cpu"))
    monkeypatch.setattr("folovllm.sample.sampler._GROUP_ELEMENTS", 3 * 1024)  # groups of 3 rows, the last of 2
    assert shortlist_sampler().forward(logits, SamplingMetadata.build(rows, 1024, "cpu")) == whole


def test_penalties_on_cells_equal_penalties_on_the_whole_row() -> None:
    g = torch.Generator().manual_seed(0)
    for seed in range(30):
        logits = make_logits(KINDS[seed % len(KINDS)], 1, 1000, seed)
        prompt, output = (torch.randint(0, 1000, (60,), generator=g).tolist() for _ in range(2))
        output = output[:30] * (1 + seed % 3)
        repetition, frequency, presence = 1.0 + seed % 4 / 4, seed % 5 / 4 - 0.5, seed % 3 / 2
        counts = torch.bincount(torch.tensor(output), minlength=1000).float()
        seen = counts + torch.bincount(torch.tensor(prompt), minlength=1000) > 0
        x = logits[0]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x = x - frequency * counts - presence * (counts > 0)
        built = build_penalties([0], [prompt], [output], [(repetition, frequency, presence)], 1000, "cpu")
        apply_penalties_(logits, built)
        assert torch.equal(logits[0], x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 5, 20, 300])
def test_the_most_likely_are_in_order_of_value_then_id(kind: str, k: int) -> None:
    logprobs = make_logits(kind, 4, 4096, 2)
    expected = logprobs.sort(dim=-1, descending=True, stable=True).indices[:, :k].tolist()
    got = logprobs_to_host(rank_logprobs(logprobs, torch.zeros(4, dtype=torch.int64), [k] * 4))
    assert [one.token_ids[1:] for one in got] == expected
