"""The sampler as a whole: order of operations, distribution, logprobs, independence of rows, rows left empty."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.sample.logprobs import logprobs_to_host, rank_logprobs
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.sampler import LOGPROBS_MODES, Sampler, SamplerOutput
from folovllm.sampling_params import SamplingParams

pytestmark = pytest.mark.m1

INF = math.inf


def a_row(
    output: list[int] | None = None,
    prompt: list[int] | None = None,
    seed: int = 0,
    eos: int | None = None,
    bad_words: list[list[int]] | None = None,
    **params: Any,
) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), prompt or [], output or [], eos, seed, bad_words or [])


def run(logits: torch.Tensor, rows: list[SamplingRow], mode: str = "raw_logprobs") -> SamplerOutput:
    before = logits.clone()
    metadata = SamplingMetadata.build(rows, logits.shape[-1], logits.device)
    output = Sampler(mode).forward(logits, metadata)  # type: ignore[arg-type]
    assert torch.equal(logits, before), "the sampler changed its caller's logits"
    return output


def processed_logits(logits: list[float], row: SamplingRow) -> list[float]:
    """What is left of one row of logits after all steps, read through the logprobs of mode processed_logits."""
    row = dataclasses.replace(row, params=row.params.replace(logprobs=len(logits)))
    one = run(torch.tensor([logits]), [row], "processed_logits").logprobs[0]
    assert one is not None
    by_id = dict(zip(one.token_ids, one.logprobs, strict=True))
    return [by_id[t] for t in range(len(logits))]


# ---- the order of operations

LOGITS = [2.0, 1.0, -1.0, -0.25, 3.0, -2.0]
CHAIN: dict[str, Any] = {
    "logit_bias": {0: -4.0, 1: 1.0},
    "repetition_penalty": 2.0,
    "frequency_penalty": 0.25,
    "presence_penalty": 0.5,
    "temperature": 0.5,
}
PROMPT, OUTPUT = [0], [1, 1, 4]


def test_the_chain_worked_by_hand() -> None:
    # token            0      1      2      3      4      5
    # logits           2      1     -1    -0.25    3     -2
    # bias            -2      2     -1    -0.25    3     -2     0: -4, 1: +1
    # repetition 2    -4      1     -1    -0.25    1.5   -2     seen 0 (prompt), 1, 4 (output): > 0 halved, < 0 doubled
    # frequency 1/4   -4      0.5   -1    -0.25    1.25  -2     1 twice, 4 once; the prompt does not count
    # presence 1/2    -4      0     -1    -0.25    0.75  -2     1 and 4
    # temperature 1/2 -8      0     -2    -0.5     1.5   -4
    row = a_row(OUTPUT, PROMPT, **CHAIN)
    assert processed_logits(LOGITS, row) == [-8.0, 0.0, -2.0, -0.5, 1.5, -4.0]
    # e^(l - 1.5):   7e-5  0.2231 0.0302 0.1353   1   0.0041   the probabilities before normalisation
    # min_p 0.1 keeps 4, 1, 3.
    row = a_row(OUTPUT, PROMPT, **CHAIN, min_p=0.1)
    assert processed_logits(LOGITS, row) == [-INF, 0.0, -INF, -0.5, 1.5, -INF]
    # Their sum is 1.3584: 0.0996, 0.1642, 0.7362. top_p 0.9: 0.0996 <= 0.1, so 3 goes.
    row = a_row(OUTPUT, PROMPT, **CHAIN, min_p=0.1, top_p=0.9)
    assert processed_logits(LOGITS, row) == [-INF, 0.0, -INF, -INF, 1.5, -INF]
    # The same through top_k 3 in place of min_p.
    row = a_row(OUTPUT, PROMPT, **CHAIN, top_k=3, top_p=0.9)
    assert processed_logits(LOGITS, row) == [-INF, 0.0, -INF, -INF, 1.5, -INF]


def _softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def _scalar_steps(p: SamplingParams) -> dict[str, Callable[[list[float]], list[float]]]:
    """Every order-sensitive step once more, on plain lists."""

    def keep(row: list[float], ok: Callable[[int], bool]) -> list[float]:
        return [x if ok(i) else -INF for i, x in enumerate(row)]

    def repetition(row: list[float]) -> list[float]:
        r, seen = p.repetition_penalty, {*PROMPT, *OUTPUT}
        return [x if i not in seen else x / r if x > 0 else x * r for i, x in enumerate(row)]

    def min_p(row: list[float]) -> list[float]:
        probs = _softmax(row)
        return keep(row, lambda i: probs[i] >= p.min_p * max(probs))

    def top_k(row: list[float]) -> list[float]:
        return keep(row, lambda i: row[i] >= sorted(row, reverse=True)[p.top_k - 1]) if p.top_k else row

    def top_p(row: list[float]) -> list[float]:
        probs = _softmax(row)
        below = {i: sum(q for q in probs if q <= probs[i]) for i in range(len(row))}  # no ties in this test
        return keep(row, lambda i: below[i] > 1 - p.top_p or probs[i] == max(probs))

    return {
        "bias": lambda row: [x + (p.logit_bias or {}).get(i, 0.0) for i, x in enumerate(row)],
        "repetition": repetition,
        "frequency": lambda row: [x - p.frequency_penalty * OUTPUT.count(i) for i, x in enumerate(row)],
        "presence": lambda row: [x - p.presence_penalty * (i in OUTPUT) for i, x in enumerate(row)],
        "temperature": lambda row: [x / p.temperature for x in row],
        "min_p": min_p,
        "top_k": top_k,
        "top_p": top_p,
    }


ORDER = ["bias", "repetition", "frequency", "presence", "temperature", "min_p", "top_k", "top_p"]


def _apply(params: SamplingParams, order: list[str]) -> list[float]:
    row, steps = LOGITS, _scalar_steps(params)
    for name in order:
        row = steps[name](row)
    return row


@pytest.mark.parametrize(
    ("extra", "first", "second"),
    [
        ({}, "bias", "repetition"),
        ({}, "repetition", "frequency"),
        ({}, "repetition", "presence"),
        ({}, "presence", "temperature"),
        ({}, "frequency", "temperature"),
        ({"min_p": 0.1, "top_p": 0.9}, "temperature", "min_p"),
        ({"min_p": 0.1, "top_p": 0.9}, "min_p", "top_p"),
        ({"top_k": 3, "top_p": 0.9}, "top_k", "top_p"),
    ],
)
def test_the_order_matters_and_is_the_documented_one(extra: dict[str, Any], first: str, second: str) -> None:
    params = SamplingParams(**CHAIN, **extra)
    swapped = [{first: second, second: first}.get(name, name) for name in ORDER]
    got = processed_logits(LOGITS, a_row(OUTPUT, PROMPT, **CHAIN, **extra))
    assert got == pytest.approx(_apply(params, ORDER))
    assert got != pytest.approx(_apply(params, swapped)), "this example cannot tell the two orders apart"


# ---- the distribution


def chi_square_p(counts: torch.Tensor, probabilities: list[float]) -> float:
    """Upper tail probability of the chi-square statistic; tokens of probability 0 must not occur at all."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * counts.sum()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    statistic = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    df = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(df, statistic / 2).item()


PROBABILITIES = [0.4, 0.2, 0.15, 0.1, 0.07, 0.05, 0.02, 0.01]
DRAWS = 50_000


def _normalised(weights: list[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, _normalised([p**2 for p in PROBABILITIES])),
        ({"temperature": 2.0}, _normalised([p**0.5 for p in PROBABILITIES])),
        ({"top_k": 3}, [0.4 / 0.75, 0.2 / 0.75, 0.15 / 0.75, 0, 0, 0, 0, 0]),
        ({"top_p": 0.8}, [0.4 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0.1 / 0.85, 0, 0, 0, 0]),  # 0.75 < 0.8 <= 0.85
        ({"min_p": 0.15}, _normalised([0.4, 0.2, 0.15, 0.1, 0.07, 0, 0, 0])),  # threshold 0.06
        ({"logit_bias": {7: math.log(40)}}, _normalised([0.4, 0.2, 0.15, 0.1, 0.07, 0.05, 0.02, 0.4])),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "output_index"])
def test_50k_draws_follow_the_distribution(params: dict[str, Any], expected: list[float], vary: str) -> None:
    logits = torch.tensor(PROBABILITIES).log().expand(DRAWS, -1)
    metadata = SamplingMetadata.build([a_row(**params)] * DRAWS, 8, "cpu")
    if vary == "seed":
        metadata = dataclasses.replace(metadata, seeds=list(range(DRAWS)))
    else:
        metadata = dataclasses.replace(metadata, seeds=[1234] * DRAWS, output_indices=list(range(DRAWS)))
    drawn = Sampler().forward(logits, metadata).sampled_token_ids
    assert chi_square_p(torch.bincount(torch.tensor(drawn), minlength=8), expected) > 1e-3


def test_a_uniform_large_vocabulary_is_drawn_from_evenly() -> None:
    metadata = SamplingMetadata.build([a_row(seed=s) for s in range(4096)], 4096, "cpu")
    drawn = torch.tensor(Sampler().forward(torch.zeros(4096, 4096), metadata).sampled_token_ids)
    counts = torch.bincount(drawn // 64, minlength=64)
    assert chi_square_p(counts, [1 / 64] * 64) > 1e-3


# ---- seeds


def test_the_same_seed_and_index_give_the_same_token_and_others_give_others() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int, index: int) -> int:
        return run(logits, [a_row(output=[0] * index, seed=seed)]).sampled_token_ids[0]

    first = [draw(s, i) for s in range(5) for i in range(5)]
    assert first == [draw(s, i) for s in range(5) for i in range(5)]
    assert len(set(first)) >= 24  # 25 draws of 1000: a collision has probability 0.26, two are rare
    # Sampling in between, in any order, changes nothing: there is no state.
    assert draw(4, 4) == first[24] and draw(0, 0) == first[0]


def test_which_tokens_were_generated_does_not_matter_only_how_many() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    assert run(logits, [a_row([1, 2, 3], seed=7)]) == run(logits, [a_row([9, 9, 9], [4, 4], seed=7)])


# ---- greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_largest(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]], dtype=dtype)
    assert run(logits, [a_row(temperature=0.0)] * 2).sampled_token_ids == [1, 0]


def test_greedy_sees_bias_and_penalties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    rows = [
        a_row(temperature=0.0, logit_bias={0: 5.0}),
        a_row([1], temperature=0.0, presence_penalty=1.5),
        a_row(prompt=[1], temperature=0.0, repetition_penalty=2.0),
    ]
    assert run(logits, rows).sampled_token_ids == [0, 2, 2]


def test_mixed_batch_of_greedy_and_random_rows() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    rows = [a_row(seed=i, temperature=0.0 if i % 2 else 5.0, top_k=200, top_p=0.99) for i in range(6)]
    tokens = run(logits, rows).sampled_token_ids
    best = logits.argmax(-1).tolist()
    assert [tokens[i] for i in (1, 3, 5)] == [best[i] for i in (1, 3, 5)]
    assert [tokens[i] for i in (0, 2, 4)] != [best[i] for i in (0, 2, 4)]
    assert tokens == [run(logits[i : i + 1], [rows[i]]).sampled_token_ids[0] for i in range(6)]


def test_a_batch_without_rows() -> None:
    assert run(torch.zeros(0, 5), []) == SamplerOutput([], [])


# ---- constraints, end to end


def test_bad_words_of_several_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(3, 1)
    rows = [a_row(output, temperature=0.0, bad_words=[[1, 2, 3]]) for output in ([1, 2], [2, 1], [])]
    assert run(logits, rows).sampled_token_ids == [2, 3, 3]
    # A prompt that ends with the first part does not count.
    assert run(logits[:1], [a_row([], [1, 2], temperature=0.0, bad_words=[[1, 2, 3]])]).sampled_token_ids == [3]


def test_min_tokens_masks_eos_and_stop_ids() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(3, 1)
    rows = [a_row([0] * n, eos=3, temperature=0.0, min_tokens=2, stop_token_ids=[2]) for n in range(3)]
    assert run(logits, rows).sampled_token_ids == [1, 1, 3]


def test_allowed_token_ids() -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    rows = [a_row(seed=i, allowed_token_ids=[3, 30], temperature=3.0) for i in range(40)]
    assert set(run(logits, rows).sampled_token_ids) == {3, 30}


EMPTIED = [
    # (what empties the row, the token it must take); logits are [0, 1, 2, 3]
    ({"allowed_token_ids": [1], "bad_words": [[1]]}, 1),  # the best allowed token, bad or not
    ({"allowed_token_ids": [0, 2], "bad_words": [[0], [2]]}, 2),
    ({"allowed_token_ids": [0], "eos": 0, "min_tokens": 5}, 0),
    ({"bad_words": [[0], [1], [2], [3]]}, 3),  # the best token
    ({"allowed_token_ids": [99]}, 3),  # nothing allowed exists
    ({"bad_words": [[0], [1], [2], [3]], "logit_bias": {0: 50.0}, "repetition_penalty": 9.0}, 3),
]


@pytest.mark.parametrize(("constraints", "token"), EMPTIED)
@pytest.mark.parametrize("draw", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5, "top_k": 2, "min_p": 0.1}])
@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_a_row_left_empty_takes_its_best_token(
    constraints: dict[str, Any], token: int, draw: dict[str, Any], mode: str
) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(3, 1)
    mates = [a_row(seed=5, logprobs=4), a_row(temperature=0.0, logprobs=4, bad_words=[[3]])]
    rows = [mates[0], a_row(logprobs=4, **constraints, **draw), mates[1]]
    output = run(logits, rows, mode)
    assert output.sampled_token_ids[1] == token
    without = run(logits[:2], mates, mode)
    assert [output.sampled_token_ids[i] for i in (0, 2)] == without.sampled_token_ids
    assert [output.logprobs[i] for i in (0, 2)] == without.logprobs
    for one in output.logprobs:
        assert one is not None and not any(math.isnan(x) for x in one.logprobs)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e300},
        {"temperature": 0.01},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"min_p": 1.0},
        {"top_p": 1e-30},
    ],
)
def test_extreme_numbers_do_not_become_nan(params: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 1.0, 2e4, -3e4]])
    row = a_row([0, 1, 3], [2], logprobs=4, allowed_token_ids=[0, 1, 2], **params)
    output = run(logits, [row], "processed_logprobs")
    assert output.sampled_token_ids[0] in (0, 1, 2)
    assert output.logprobs[0] is not None and not any(math.isnan(x) for x in output.logprobs[0].logprobs)


# ---- logprobs


def test_logprobs_sampled_token_first_then_the_top_with_vllms_rank() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().repeat(4, 1)
    rows = [a_row(temperature=0.0, logit_bias={0: 9.0}, logprobs=k) for k in (0, 2, 4, None)]
    output = run(logits, rows)
    assert output.sampled_token_ids == [0] * 4
    ones = output.logprobs
    assert ones[3] is None
    assert [o.token_ids for o in ones[:3] if o] == [[0], [0, 1, 2], [0, 1, 2, 3, 0]]
    # Raw: the bias that made token 0 win does not show. 0.1 is the 4th largest.
    assert [o.rank for o in ones[:3] if o] == [4, 4, 4]
    assert ones[1] is not None
    assert ones[1].logprobs == pytest.approx([math.log(0.1), math.log(0.4), math.log(0.3)])


def test_ties_push_the_rank_up_and_equals_are_listed_by_id() -> None:
    # -1 occurs 3 times and one entry is larger: 4 entries are >= -1, so the rank of each of the three is 4.
    logprobs = torch.tensor([[-1.0, -0.5, -1.0, -7.0, -1.0]]).repeat(5, 1)
    got = logprobs_to_host(rank_logprobs(logprobs, torch.arange(5), [3] * 5))
    assert [o.rank for o in got] == [4, 1, 4, 5, 4]
    assert [o.token_ids for o in got] == [[t, 1, 0, 2] for t in range(5)]
    assert got[3].logprobs == [-7.0, -0.5, -1.0, -1.0]


def test_rank_logprobs_takes_counts_per_row_and_many_rows() -> None:
    logprobs = torch.randn(150, 40, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    token_ids = torch.arange(150) % 40
    counts = [i % 41 for i in range(150)]
    got = logprobs_to_host(rank_logprobs(logprobs, token_ids, counts))
    for i, one in enumerate(got):
        values, ids = logprobs[i].sort(descending=True, stable=True)
        assert one.token_ids == [i % 40, *ids[: counts[i]].tolist()]
        assert one.logprobs == [logprobs[i, i % 40].item(), *values[: counts[i]].tolist()]
        assert one.rank == (logprobs[i] >= logprobs[i, i % 40]).sum().item()


def test_most_likely_sorts_every_kind_of_float() -> None:
    row = torch.tensor([[0.0, -0.0, 1e-40, -1e-40, -INF, INF, 1.5, -1.5, 3e38, -3e38]])
    (got,) = logprobs_to_host(rank_logprobs(row, torch.tensor([0]), [10]))
    assert got.token_ids[1:] == [5, 8, 6, 2, 0, 1, 3, 7, 9, 4]  # 0.0 and -0.0 are equal: by id


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_four_logprobs_modes(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]], dtype=dtype)
    row = a_row(temperature=0.5, logit_bias={1: 1.5}, top_k=2, logprobs=4)

    def values(mode: str) -> list[float]:
        one = run(logits, [row], mode).logprobs[0]
        assert one is not None
        by_id = dict(zip(one.token_ids, one.logprobs, strict=True))
        return [by_id[t] for t in range(4)]

    assert values("raw_logits") == [2.0, 0.0, 1.0, -1.0]
    assert values("raw_logprobs") == pytest.approx(logits[0].float().log_softmax(-1).tolist())
    assert values("processed_logits") == [4.0, 3.0, -INF, -INF]  # (2, 0 + 1.5) / 0.5
    # log(1 / (1 + e^-1)) = -0.3133, and 1 less
    assert values("processed_logprobs") == pytest.approx([-0.3133, -1.3133, -INF, -INF], abs=1e-4)


def test_an_unknown_logprobs_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="logprobs_mode must be one of raw_logprobs"):
        Sampler("cooked")  # type: ignore[arg-type]


# ---- rows do not know each other


@st.composite
def sampling_rows(draw: st.DrawFn, vocab_size: int) -> tuple[SamplingRow, int]:
    """A random request, and the seed of its logits."""
    ids = st.integers(0, vocab_size - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 20])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.4])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -0.5])),
        logit_bias=draw(st.none() | st.dictionaries(ids, st.floats(-5, 5), min_size=1, max_size=3)),
        allowed_token_ids=draw(st.none() | st.lists(ids, min_size=1, max_size=6)),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        stop_token_ids=draw(st.none() | st.lists(ids, max_size=2)),
        logprobs=draw(st.sampled_from([None, 0, 2, 7])),
    )
    row = SamplingRow(
        params=params,
        prompt_token_ids=draw(st.lists(ids, max_size=4)),
        output_token_ids=draw(st.lists(ids, max_size=4)),
        eos_token_id=draw(st.none() | ids),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        bad_words_token_ids=draw(st.lists(st.lists(ids, min_size=1, max_size=2), max_size=3)),
    )
    return row, draw(st.integers(0, 1000))


def some_logits(seed: int, vocab_size: int) -> torch.Tensor:
    """Coarse values, so that ties are common. `[V]`"""
    return (torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), mode=st.sampled_from(LOGPROBS_MODES), vocab_size=st.sampled_from([11, 67, 1000]))
def test_adding_removing_and_swapping_rows_changes_no_other_row(
    data: st.DataObject, mode: str, vocab_size: int
) -> None:
    batch = data.draw(st.lists(sampling_rows(vocab_size), min_size=1, max_size=7))
    rows = [row for row, _ in batch]
    logits = torch.stack([some_logits(seed, vocab_size) for _, seed in batch])

    def sample(order: list[int]) -> dict[int, Any]:
        output = run(logits[order], [rows[i] for i in order], mode)
        return dict(zip(order, zip(output.sampled_token_ids, output.logprobs, strict=True), strict=True))

    together = sample(list(range(len(rows))))
    assert together == {i: sample([i])[i] for i in range(len(rows))}  # removed: each row alone
    order = data.draw(st.permutations(range(len(rows))))
    assert together == sample(list(order))  # swapped
    some = list(order[: data.draw(st.integers(1, len(rows)))])
    assert sample(some) == {i: together[i] for i in some}  # part of the batch


def test_rows_of_a_real_vocabulary_do_not_depend_on_the_batch() -> None:
    """49,152 tokens: large enough for torch to split rows and batch over threads."""
    vocab_size = 49_152
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.05}, {"temperature": 0.0}]
    rows = [a_row(seed=i, logprobs=3, **kind) for i, kind in enumerate(itertools.islice(itertools.cycle(kinds), 12))]
    logits = torch.randn(12, vocab_size, generator=torch.Generator().manual_seed(4)) * 3
    together = run(logits, rows)
    for i in range(12):
        alone = run(logits[i : i + 1], [rows[i]])
        assert alone.sampled_token_ids == [together.sampled_token_ids[i]]
        assert alone.logprobs == [together.logprobs[i]]
