"""Notebook 06: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M5. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import notebook_checks

pytestmark = pytest.mark.m5

(SOURCE,) = notebook_checks.sources("06")

ANSWERS = {
    "my_first_steps = None": "my_first_steps = [5, 9]",
    '''    """Nothing else arrives, and no request ends meanwhile."""
    return None  # your code''': """
    return -(-prompt // (budget - decodes))""",
    "my_budget = None": "my_budget = 128",
}


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """With right answers to its tasks. It rejects wrong ones."""
    notebook_checks.check_tasks(SOURCE, monkeypatch, ANSWERS)


@pytest.mark.parametrize(("source", "turn"), notebook_checks.turns_of("06"))
def test_no_other_value_of_a_knob_breaks_it(
    source: Path, turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook_checks.check_turned(source, turn, monkeypatch)


def test_the_committed_notebook_is_its_source() -> None:
    notebook_checks.check_committed(SOURCE)


def test_it_asks_and_checks() -> None:
    notebook_checks.check_asks(SOURCE)
