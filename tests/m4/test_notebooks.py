"""Notebooks 02 and 05: each runs in fast mode, checks itself, and is committed as its source builds it.

Milestone: M4. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import notebook_checks

pytestmark = pytest.mark.m4

NUMBERS = ("02", "05")
ANSWERS_05 = {
    '''    """The new (m, l, O) after a tile. `tile_scores` and `tile_values` are lists of the same length."""''': """
    new_m = max([m, *tile_scores])
    correction = math.exp(m - new_m)
    p = [math.exp(score - new_m) for score in tile_scores]
    return new_m, l * correction + sum(p), O * correction + sum(a * b for a, b in zip(p, tile_values))""",
    '''    """Returns "skip", "all" or "mask"."""''': """
    if first_key > position + num_rows - 1:
        return "skip"
    return "all" if first_key + num_keys - 1 <= position else "mask"
""",
    '''    """The attention over the keys of both parts."""''': """
    largest = max(lse_1, lse_2)
    share_1, share_2 = math.exp(lse_1 - largest), math.exp(lse_2 - largest)
    return (share_1 * out_1 + share_2 * out_2) / (share_1 + share_2)
""",
}
ANSWERS_02 = {
    '''    """`peak` is in FLOP/s, `bandwidth` in bytes/s."""
    return None  # your code''': """
    return peak / bandwidth * bytes_per_weight / 2""",
    "my_sequences = None": "my_sequences = weights_bytes // (1000 * kv_bytes)",
    "my_ms = None": "my_ms = arch.num_parameters() / 2 / REFERENCE.bandwidth * 1000",
}
SOURCES = notebook_checks.sources(*NUMBERS)
NOTEBOOKS = [pytest.param(source, id=source.stem) for source in SOURCES]


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


def test_both_are_there() -> None:
    assert len(NOTEBOOKS) == len(NUMBERS)


@pytest.mark.parametrize(
    ("source", "answers"),
    [pytest.param(*pair, id=pair[0].stem) for pair in zip(SOURCES, (ANSWERS_02, ANSWERS_05), strict=True)],
)
def test_a_notebook_runs_and_its_asserts_hold(
    source: Path, answers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With right answers to its tasks. It rejects wrong ones."""
    dtype = torch.get_default_dtype()
    notebook_checks.check_tasks(source, monkeypatch, answers)
    assert torch.get_default_dtype() is dtype, "it must leave torch as it found it"


@pytest.mark.parametrize(("source", "turn"), notebook_checks.turns_of(*NUMBERS))
def test_no_other_value_of_a_knob_breaks_it(
    source: Path, turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook_checks.check_turned(source, turn, monkeypatch)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_the_committed_notebook_is_its_source(source: Path) -> None:
    notebook_checks.check_committed(source)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_asks_and_checks(source: Path) -> None:
    notebook_checks.check_asks(source)
