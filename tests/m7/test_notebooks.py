"""Notebook 08: it runs in fast mode, checks itself, asks, is what its source builds, and its tasks can be done.

Milestone: M7. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import notebook_checks

pytestmark = pytest.mark.m7

(SOURCE,) = notebook_checks.sources("08")
ANSWERS = {
    "    # Your turn: replace this line by a list, such as [... for w in weights].": """
    return [min(max(round(w / scale) + zero, 0), max_level) for w in weights]""",
    "    # Your turn: return a new list. Weights before i stay, weight i becomes `rounded`, later ones move.": """
    error = (weights[i] - rounded) / u[i]
    return [w if j < i else w - error * u[j] for j, w in enumerate(weights)]""",
    "    # Your turn: return a number.": """
    return sum(level << (4 * i) for i, level in enumerate(levels))""",
}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Pictures go nowhere; what the notebook does to threads and warnings ends with it."""
    threads = torch.get_num_threads()
    with notebook_checks.pictures_go_nowhere(), warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """With right answers to its tasks. It rejects wrong ones."""
    notebook_checks.check_tasks(SOURCE, monkeypatch, ANSWERS)


@pytest.mark.parametrize(("source", "turn"), notebook_checks.turns_of("08"))
def test_no_other_value_of_a_knob_breaks_it(
    source: Path, turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook_checks.check_turned(source, turn, monkeypatch)


def test_the_committed_notebook_is_its_source() -> None:
    notebook_checks.check_committed(SOURCE)


def test_it_asks_and_checks() -> None:
    notebook_checks.check_asks(SOURCE)
