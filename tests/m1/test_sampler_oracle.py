"""The processors against transformers' logits processors, which were written independently of ours and of vLLM's."""

from collections.abc import Callable

import pytest
import torch

from folovllm.sample.ops.masks import banned_by_bad_words
from folovllm.sample.ops.penalties import apply_penalties_, build_penalties
from folovllm.sample.ops.topk_topp import apply_min_p_, apply_temperature_, apply_top_k_, apply_top_p_

pytestmark = pytest.mark.m1
hf = pytest.importorskip("transformers.generation.logits_process")

V = 503
NO_IDS = torch.zeros(1, 1, dtype=torch.long)


@pytest.fixture(params=["smooth", "peaked", "with ties"])
def logits(request: pytest.FixtureRequest) -> torch.Tensor:
    """`[6, V]`"""
    values = torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    return {"smooth": values, "peaked": values * 8, "with ties": (values * 2).round() / 2}[request.param]


def row_by_row(logits: torch.Tensor, settings: list, make: Callable) -> torch.Tensor:
    """transformers takes one setting per call, ours takes one per row."""
    return torch.cat([make(s)(NO_IDS, logits[i : i + 1].clone()) for i, s in enumerate(settings)])


def test_temperature(logits: torch.Tensor) -> None:
    settings = [0.1, 0.5, 0.8, 1.0, 1.7, 10.0]
    ours = logits.clone()
    apply_temperature_(ours, torch.tensor(settings))
    torch.testing.assert_close(ours, row_by_row(logits, settings, hf.TemperatureLogitsWarper))


def test_top_k(logits: torch.Tensor) -> None:
    settings = [1, 2, 7, 50, 400, V]
    ours = logits.clone()
    apply_top_k_(ours, torch.tensor(settings), max_top_k=400)
    assert torch.equal(ours, row_by_row(logits, settings, hf.TopKLogitsWarper))


@pytest.mark.parametrize("settings", [[0.01, 0.3, 0.5, 0.9, 0.95, 0.999], [0.2, 0.4, 0.6, 0.7, 0.8, 1.0]])
def test_top_p(logits: torch.Tensor, settings: list[float]) -> None:
    ours = logits.clone()
    apply_top_p_(ours, torch.tensor(settings))
    theirs = row_by_row(logits, settings, hf.TopPLogitsWarper)
    # Which of several equal tokens stay is left open by transformers; how many, and their values, is not.
    assert torch.equal(ours.sort(dim=-1).values, theirs.sort(dim=-1).values)
    if logits.unique().numel() > logits.numel() // 2:
        assert torch.equal(ours, theirs)


def test_min_p(logits: torch.Tensor) -> None:
    settings = [0.0, 0.001, 0.05, 0.1, 0.5, 1.0]
    ours = logits.clone()
    apply_min_p_(ours, torch.tensor(settings))
    assert torch.equal(ours, row_by_row(logits, settings, hf.MinPLogitsWarper))


def test_repetition_penalty_over_prompt_and_output(logits: torch.Tensor) -> None:
    settings = [0.5, 0.9, 1.1, 1.3, 2.0, 5.0]
    prompts = [torch.randint(0, V, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)]
    outputs = [torch.randint(0, V, (9 * i,), generator=torch.Generator().manual_seed(9 + i)).tolist() for i in range(6)]
    ours = logits.clone()
    strengths = [(s, 0.0, 0.0) for s in settings]
    apply_penalties_(ours, build_penalties(range(6), prompts, outputs, strengths, V, "cpu"))
    for i, s in enumerate(settings):
        ids = torch.tensor([prompts[i] + outputs[i]])
        theirs = hf.RepetitionPenaltyLogitsProcessor(s)(ids, logits[i : i + 1].clone())
        torch.testing.assert_close(ours[i : i + 1], theirs)


@pytest.mark.parametrize("output", [[], [5], [1, 2], [7, 1, 2], [1, 2, 3, 4], [2, 1]])
def test_bad_words(output: list[int]) -> None:
    bad_words = [[9], [1, 2, 3], [2, 4], [5, 5], [1, 2, 3, 4, 6]]
    theirs = hf.NoBadWordsLogitsProcessor(bad_words)(torch.tensor([[0, *output]]), torch.zeros(1, 10))
    assert sorted(set(banned_by_bad_words(bad_words, output))) == (theirs[0] == -torch.inf).nonzero().flatten().tolist()
