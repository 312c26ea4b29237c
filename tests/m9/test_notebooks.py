"""Notebook 11: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M9. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import notebook_checks

pytestmark = pytest.mark.m9

(SOURCE,) = notebook_checks.sources("11")
ANSWERS = {
    '''    """`bias` is a list. Rank 0 is always there, whatever the number of ranks."""
    return None  # your code''': """
    return bias if rank == 0 else [0.0] * len(bias)""",
    """def all_reduces(num_layers, tp, pp):
    return None  # your code""": """def all_reduces(num_layers, tp, pp):
    return 2 * num_layers // pp + 1 if tp > 1 else 0""",
    """def bubble(p, m):
    return None  # your code""": """def bubble(p, m):
    return (p - 1) / (m + p - 1)""",
}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """With right answers to its tasks. It rejects wrong ones."""
    notebook_checks.check_tasks(SOURCE, monkeypatch, ANSWERS)


@pytest.mark.parametrize(("source", "turn"), notebook_checks.turns_of("11"))
def test_no_other_value_of_a_knob_breaks_it(
    source: Path, turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook_checks.check_turned(source, turn, monkeypatch)


def test_the_committed_notebook_is_its_source() -> None:
    notebook_checks.check_committed(SOURCE)


def test_it_asks_and_checks() -> None:
    notebook_checks.check_asks(SOURCE)
