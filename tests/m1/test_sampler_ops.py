"""Each processor of the sampler on vectors worked by hand; the arithmetic stands beside the numbers."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.ops import topk_topp
from folovllm.sample.ops.masks import (
    TokenPairs,
    apply_allowed_token_ids_,
    apply_logit_bias_,
    banned_by_bad_words,
    mask_tokens_,
    revive_empty_rows_,
    stop_ids_before_min_tokens,
    unmasked_choice,
)
from folovllm.sample.ops.penalties import apply_penalties_, build_penalties
from folovllm.sample.ops.topk_topp import (
    apply_min_p_,
    apply_temperature_,
    apply_top_k_,
    apply_top_p_,
    nucleus_by_sorting,
    random_sample,
)
from folovllm.sampling_params import SamplingParams

pytestmark = pytest.mark.m1

INF = math.inf


def log(*probabilities: float) -> torch.Tensor:
    """One row of logits whose softmax is the given distribution."""
    return torch.tensor([probabilities]).log()


def kept(logits: torch.Tensor) -> list[list[int]]:
    """Per row the token ids that are still possible."""
    return [(row > -INF).nonzero().flatten().tolist() for row in logits]


# ---- masks


def test_allowed_token_ids_forbids_the_others() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    apply_allowed_token_ids_(logits, torch.tensor([[True, False, True], [False, False, False]]))
    assert logits.tolist() == [[-INF, 2.0, -INF], [4.0, 5.0, 6.0]]


def test_mask_tokens_touches_only_its_cells() -> None:
    logits = torch.zeros(3, 4)
    cells = TokenPairs.build([(0, 1), (0, 3), (2, 0), (2, 0)], "cpu")
    assert cells is not None
    mask_tokens_(logits, cells)
    assert kept(logits) == [[0, 2], [0, 1, 2, 3], [1, 2, 3]]


def test_logit_bias_is_added_and_cannot_revive_a_masked_token() -> None:
    logits = torch.tensor([[1.0, -INF], [1.0, 2.0]])
    cells = TokenPairs.build([(0, 1), (1, 0), (1, 1)], "cpu", values=[50.0, -3.5, 0.25])
    assert cells is not None
    apply_logit_bias_(logits, cells)
    assert logits.tolist() == [[1.0, -INF], [-2.5, 2.25]]


def test_no_cells_is_none() -> None:
    assert TokenPairs.build([], "cpu") is None


@pytest.mark.parametrize(
    ("bad_words", "output", "banned"),
    [
        ([[5]], [], [5]),  # a single token is banned from the start
        ([[5]], [1, 2], [5]),
        ([[1, 2, 3]], [9, 1, 2], [3]),  # the output ends with 1, 2
        ([[1, 2, 3]], [9, 1], []),  # 2 stays allowed: 1, 2 is not yet the word
        ([[1, 2, 3]], [2], []),  # a part of the prefix is not the prefix
        ([[1, 2, 3]], [1, 2, 9], []),  # it must be at the end
        ([[1, 2]], [], []),  # nothing written yet
        ([[7, 7]], [7], [7]),
        ([[1, 2], [4], [3, 1, 6]], [3, 1], [2, 4, 6]),
        ([[]], [1], []),
    ],
)
def test_bad_words(bad_words: list[list[int]], output: list[int], banned: list[int]) -> None:
    assert banned_by_bad_words(bad_words, output) == banned


def test_min_tokens_forbids_eos_and_stop_ids_until_it_is_reached() -> None:
    assert stop_ids_before_min_tokens(2, 0, 9, [4, 5]) == [9, 4, 5]
    assert stop_ids_before_min_tokens(2, 1, 9, None) == [9]
    assert stop_ids_before_min_tokens(2, 1, None, [4]) == [4]
    assert stop_ids_before_min_tokens(2, 2, 9, [4, 5]) == []
    assert stop_ids_before_min_tokens(0, 0, 9, [4]) == []


def test_empty_rows_get_their_choice_and_other_rows_are_untouched() -> None:
    logits = torch.tensor([[-INF, -INF, -INF], [-INF, 2.0, -INF]])
    revive_empty_rows_(logits, torch.tensor([2, 0]))
    assert logits.tolist() == [[-INF, -INF, 0.0], [-INF, 2.0, -INF]]


def test_unmasked_choice_falls_back_only_where_a_row_is_empty() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [-INF, -INF, -INF]])
    assert unmasked_choice(logits, fallback=torch.tensor([2, 2])).tolist() == [1, 2]


# ---- penalties


def penalise(logits: list[float], prompt: list[int], output: list[int], rep: float, freq: float, pres: float) -> list:
    row = torch.tensor([logits])
    apply_penalties_(row, build_penalties([0], [prompt], [output], [(rep, freq, pres)], len(logits), "cpu"))
    return row[0].tolist()


def test_penalties_count_the_tokens_of_each_row() -> None:
    outputs = [[1, 1, 3], [], [0, 9, -1]]  # 9 and -1 are outside of the vocabulary
    strengths = [(1.0, 0.5, 0.25), (2.0, 0.0, 0.0), (1.0, 0.0, 1.0)]
    built = build_penalties([4, 5, 7], [[2], [2, 2], [2]], outputs, strengths, 4, "cpu")
    columns = [getattr(built, field.name).tolist() for field in dataclasses.fields(built)]
    assert sorted(zip(*columns, strict=True)) == [
        (4, 1, 2.0, 1.0, 0.5, 0.25),
        (4, 3, 1.0, 1.0, 0.5, 0.25),
        (5, 2, 0.0, 2.0, 0.0, 0.0),  # in the prompt, which only the repetition penalty counts
        (7, 0, 1.0, 1.0, 0.0, 1.0),
    ]


def test_repetition_penalty_counts_prompt_and_output_and_divides_or_multiplies() -> None:
    # Seen: 0 (prompt), 1 (output), 2 (both). 4 / 2 = 2; -3 * 2 = -6; 1 / 2 = 0.5 (once, although seen twice); 5 unseen.
    assert penalise([4.0, -3.0, 1.0, 5.0], [0, 2], [1, 2], 2.0, 0.0, 0.0) == [2.0, -6.0, 0.5, 5.0]
    # Below 1 it encourages: 4 / 0.5 = 8; -3 * 0.5 = -1.5.
    assert penalise([4.0, -3.0], [0], [1], 0.5, 0.0, 0.0) == [8.0, -1.5]
    # A masked token stays masked, 0 stays 0.
    assert penalise([-INF, 0.0], [0, 1], [], 2.0, 0.0, 0.0) == [-INF, 0.0]


def test_frequency_penalty_counts_output_only() -> None:
    # Token 1 three times: 1 - 3 * 0.5 = -0.5; token 2 once: 2 - 0.5 = 1.5; token 0 only in the prompt: unchanged.
    assert penalise([1.0, 1.0, 2.0], [0, 0], [1, 2, 1, 1], 1.0, 0.5, 0.0) == [1.0, -0.5, 1.5]


def test_presence_penalty_is_the_same_however_often() -> None:
    assert penalise([1.0, 1.0, 2.0], [0, 0], [1, 2, 1, 1], 1.0, 0.0, 0.5) == [1.0, 0.5, 1.5]
    assert penalise([1.0, 1.0], [], [1], 1.0, 0.0, -2.0) == [1.0, 3.0]  # negative ones encourage


def test_penalties_together_repetition_first() -> None:
    # Token 1 (twice in the output): 4 / 2 = 2, - 0.25 * 2 = 1.5, - 0.5 = 1. The other order would give 1.5.
    assert penalise([1.0, 4.0], [], [1, 1], 2.0, 0.25, 0.5) == [1.0, 1.0]


def test_penalties_touch_only_their_rows() -> None:
    logits = torch.ones(3, 2)
    apply_penalties_(logits, build_penalties([2], [[0]], [[1]], [(2.0, 0.0, 1.0)], 2, "cpu"))
    assert logits.tolist() == [[1.0, 1.0], [1.0, 1.0], [0.5, -0.5]]


# ---- temperature and truncation


def test_temperature_divides_and_leaves_greedy_rows_alone() -> None:
    logits = torch.tensor([[1.0, -2.0], [1.0, -2.0], [1.0, -2.0]])
    apply_temperature_(logits, torch.tensor([0.5, 2.0, 0.0]))
    assert logits.tolist() == [[2.0, -4.0], [0.5, -1.0], [1.0, -2.0]]


def test_min_p() -> None:
    # p_max = 0.5. min_p 0.2 -> threshold 0.1 -> 0.05 goes; 0.5 -> 0.25 -> 0.15 and 0.05 go; 1 -> only 0.5 stays.
    logits = log(0.5, 0.3, 0.15, 0.05).repeat(4, 1)
    apply_min_p_(logits, torch.tensor([0.2, 0.5, 1.0, 0.0]))
    assert kept(logits) == [[0, 1, 2], [0, 1], [0], [0, 1, 2, 3]]


def test_top_k_keeps_ties_with_the_kth() -> None:
    logits = torch.tensor([4.0, 3.0, 3.0, 1.0]).repeat(5, 1)
    apply_top_k_(logits, torch.tensor([1, 2, 3, 4, 4]), max_top_k=3)
    assert kept(logits) == [[0], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert logits[1].tolist() == [4.0, 3.0, 3.0, -INF]  # values do not change


def test_top_k_with_fewer_possible_tokens_than_k() -> None:
    logits = torch.tensor([[-INF, 1.0, -INF, 2.0]])
    apply_top_k_(logits, torch.tensor([3]), max_top_k=3)
    assert logits.tolist() == [[-INF, 1.0, -INF, 2.0]]


def test_top_p_keeps_the_token_that_crosses_p() -> None:
    # Ascending: 0.05, 0.15, 0.3, 0.5; cumulative 0.05, 0.2, 0.5, 1.
    # p 0.4: those <= 0.6 go -> only 0.5. p 0.6: <= 0.4 go -> {0.5, 0.3}: 0.5 has not reached 0.6, 0.3 crosses it.
    # p 0.9: <= 0.1 go -> 0.05 goes. p 0.001: all but the last go, which always stays. p 1: off.
    logits = log(0.15, 0.5, 0.05, 0.3).repeat(5, 1)
    apply_top_p_(logits, torch.tensor([0.4, 0.6, 0.9, 0.001, 1.0]))
    assert kept(logits) == [[1], [1, 3], [0, 1, 3], [1], [0, 1, 2, 3]]


def test_top_p_keeps_exactly_one_of_equals_if_one_is_enough() -> None:
    # Four times 0.25; p 0.5 -> cumulative 0.25, 0.5 are <= 0.5 and go; the higher two ids stay.
    logits = torch.zeros(2, 4)
    apply_top_p_(logits, torch.tensor([0.5, 0.01]))
    assert kept(logits) == [[2, 3], [3]]


def test_a_row_with_top_p_off_keeps_even_tokens_of_probability_zero() -> None:
    """Their reported logprobs would otherwise depend on whether a batch mate uses top_p."""
    logits = torch.tensor([[0.0, -200.0], [0.0, -200.0]])  # e^-200 is 0 in float32
    apply_top_p_(logits, torch.tensor([1.0, 0.999]))
    assert kept(logits) == [[0, 1], [0]]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (0.0, [1, 1, 1, 1, 1]),  # p = 1: every sum is above 0
        (0.0625, [1, 1, 1, 1, 1]),  # ascending sums 0.125, 0.25, 0.5, 0.75, 1: all above
        (0.125, [1, 0, 1, 1, 1]),  # a sum that equals the limit goes: of the two 0.125, the lower id
        (0.25, [1, 0, 1, 1, 0]),
        (0.3125, [1, 0, 1, 1, 0]),  # 0.5 crosses the limit, so the token that brings it stays
        (0.5, [0, 0, 1, 1, 0]),  # of the three 0.25, the lowest id goes
        (0.75, [0, 0, 0, 1, 0]),
        (1.0, [0, 0, 0, 1, 0]),  # p = 0: no sum is above 1, and one token stays nevertheless
        (2.0, [0, 0, 0, 1, 0]),
    ],
)
def test_the_nucleus_by_sorting_worked_by_hand(limit: float, kept: list[int]) -> None:
    probs = torch.tensor([0.25, 0.125, 0.25, 0.25, 0.125])
    assert nucleus_by_sorting(probs, torch.tensor(limit)).int().tolist() == kept


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_rounding_decides_are_sorted_and_lose_the_same_tokens(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way by buckets may give up on any row. Here it gives up on all of them, and the result does not change."""
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, ::7] = logits[:, :1]  # ties
    top_p = torch.tensor([0.999, 0.95, 0.9, 0.7, 0.5, 0.2, 0.01, 1.0])
    by_buckets, by_sorting = logits.clone(), logits.clone()
    apply_top_p_(by_buckets, top_p)
    sorted_rows = []

    def sort(probs: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        sorted_rows.append(probs)
        return nucleus_by_sorting(probs, limit)

    monkeypatch.setattr(topk_topp, "_nucleus", lambda *_: None)
    monkeypatch.setattr(topk_topp, "nucleus_by_sorting", sort)
    apply_top_p_(by_sorting, top_p)
    assert len(sorted_rows) == 7, "all rows but the one with top_p off"
    assert torch.equal(by_buckets, by_sorting)


def test_top_p_sees_what_top_k_left() -> None:
    # top_k 2 leaves [0.4, 0.3], renormalised [0.571, 0.429]. top_p 0.5 -> 0.429 <= 0.5 goes -> {0}.
    logits = log(0.4, 0.3, 0.2, 0.1)
    apply_top_k_(logits, torch.tensor([2]), 2)
    apply_top_p_(logits, torch.tensor([0.5]))
    assert kept(logits) == [[0]]
    # Without top_k: ascending cumulative 0.1, 0.3, 0.6, 1; 0.1 and 0.3 are <= 0.5 -> {0, 1} stay.
    logits = log(0.4, 0.3, 0.2, 0.1)
    apply_top_p_(logits, torch.tensor([0.5]))
    assert kept(logits) == [[0, 1]]


def test_random_sample_takes_the_only_possible_token() -> None:
    probs = torch.eye(5)
    assert random_sample(probs, [3] * 5, list(range(5))).tolist() == [0, 1, 2, 3, 4]


def test_random_sample_ignores_a_common_factor() -> None:
    probs = torch.rand(50, 30, generator=torch.Generator().manual_seed(0))
    draw = random_sample(probs, list(range(50)), [0] * 50)
    assert torch.equal(draw, random_sample(probs * 1024, list(range(50)), [0] * 50))
    assert len(set(draw.tolist())) > 10


# ---- metadata


class Untouchable(list):
    """A prompt that must not be read."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        raise AssertionError("the prompt was walked")


def a_row(
    output: list[int] | None = None, prompt: list[int] | None = None, seed: int = 0, **params: Any
) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), prompt or [], output or [], 9, seed, [])


def test_a_plain_greedy_batch_builds_no_tensor() -> None:
    metadata = SamplingMetadata.build([a_row(prompt=Untouchable([1]), temperature=0.0)] * 3, 10, "cpu")
    values = vars(metadata)
    assert {k for k, v in values.items() if v is not None} == {
        "num_rows", "all_greedy", "all_random", "max_top_k", "seeds", "output_indices", "untruncated", "num_logprobs",
    }  # fmt: skip
    assert metadata.all_greedy and not metadata.all_random
    assert metadata.seeds == [] and not metadata.changes_logits and metadata.penalties is None


def test_the_quick_way_for_plain_rows_says_what_the_long_way_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [a_row([1, 2], temperature=0.0), a_row(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)]
    quick = SamplingMetadata.build(rows, 10, "cpu")
    monkeypatch.setattr(SamplingRow, "is_plain", False)
    assert SamplingMetadata.build(rows, 10, "cpu") == quick


@pytest.mark.parametrize(
    "feature",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"allowed_token_ids": [1]},
        {"min_tokens": 1},
        {"logit_bias": {1: 0.0}},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
    ],
)
def test_a_row_that_asks_for_anything_is_not_plain(feature: dict[str, Any]) -> None:
    assert a_row(temperature=0.0).is_plain
    assert not a_row(**{"temperature": 0.0, **feature}).is_plain


def test_a_row_with_bad_words_is_not_plain() -> None:
    assert not SamplingRow(SamplingParams(temperature=0.0), [], [], 9, 0, [[3]]).is_plain


def test_features_that_nobody_uses_are_none_and_prompts_are_not_walked() -> None:
    rows = [
        a_row([1, 2], Untouchable([1]), seed=5, temperature=0.5),
        a_row(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5),
    ]
    metadata = SamplingMetadata.build(rows, 10, "cpu")
    assert not metadata.all_greedy and not metadata.all_random
    assert metadata.temperature is not None and metadata.temperature.tolist() == [0.5, 0.0]
    assert metadata.seeds == [5, 0] and metadata.output_indices == [2, 0]
    # The greedy row's own top_k, top_p and min_p do nothing.
    assert metadata.top_k is None and metadata.top_p is None and metadata.min_p is None and metadata.max_top_k == 0


def test_frequency_and_presence_penalties_do_not_walk_the_prompt() -> None:
    metadata = SamplingMetadata.build([a_row([1], Untouchable([1]), presence_penalty=1.0)], 10, "cpu")
    assert metadata.penalties is not None
    with pytest.raises(AssertionError, match="walked"):
        SamplingMetadata.build([a_row([1], Untouchable([1]), repetition_penalty=1.5)], 10, "cpu")


def test_neutral_entries_for_rows_that_do_not_use_a_feature() -> None:
    rows = [a_row(top_k=3), a_row(top_p=0.5), a_row(min_p=0.25), a_row(top_k=-1), a_row(top_k=99)]
    metadata = SamplingMetadata.build(rows, 10, "cpu")
    assert metadata.all_random and metadata.max_top_k == 3
    assert metadata.top_k is not None and metadata.top_k.tolist() == [3, 10, 10, 10, 10]
    assert metadata.top_p is not None and metadata.top_p.tolist() == [1.0, 0.5, 1.0, 1.0, 1.0]
    assert metadata.min_p is not None and metadata.min_p.tolist() == [0.0, 0.0, 0.25, 0.0, 0.0]
    assert metadata.untruncated == [3, 4]


def test_ids_outside_the_vocabulary_are_dropped() -> None:
    rows = [
        a_row(logit_bias={3: 1.0, 10: 5.0}),
        a_row(allowed_token_ids=[2, 11]),
        a_row(min_tokens=1, stop_token_ids=[77]),
        SamplingRow(SamplingParams(), [], [], None, 0, [[12], [4]]),
    ]
    metadata = SamplingMetadata.build(rows, 10, "cpu")
    assert metadata.logit_bias is not None and metadata.logit_bias.token_ids.tolist() == [3]
    assert metadata.min_tokens is not None and metadata.min_tokens.token_ids.tolist() == [9]  # EOS of a_row
    assert metadata.bad_words is not None and metadata.bad_words.token_ids.tolist() == [4]
    mask = metadata.allowed_token_ids_mask
    assert mask is not None
    assert kept(torch.zeros(4, 10).masked_fill(mask, -INF)) == [list(range(10)), [2], list(range(10)), list(range(10))]


def test_logprobs_are_limited_to_the_vocabulary() -> None:
    rows = [a_row(logprobs=99), a_row(logprobs=0), a_row()]
    assert SamplingMetadata.build(rows, 10, "cpu").num_logprobs == [10, 0, None]
