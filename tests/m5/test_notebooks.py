"""Notebook 06: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M5. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

from collections.abc import Iterator

import pytest

from tests import notebook_checks

pytestmark = pytest.mark.m5

(SOURCE,) = notebook_checks.sources("06")

ANSWERS = {
    '''    """How many tokens of a request the step computes. Replace the line below."""
    return None''': """
    wanted = min(missing, threshold) if threshold else missing
    return wanted if wanted <= budget else budget if chunked else 0""",
    '''    """Replace the line below. Nothing else arrives, and no request ends meanwhile."""
    return None''': """
    return -(-prompt // (budget - decodes))""",
    "my_budget = None": "my_budget = 128",
}


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook_checks.run_fast(SOURCE, monkeypatch)


def test_the_committed_notebook_is_its_source() -> None:
    notebook_checks.check_committed(SOURCE)


def test_it_asks_and_checks() -> None:
    notebook_checks.check_asks(SOURCE)


def test_its_tasks_accept_right_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook_checks.check_tasks(SOURCE, monkeypatch, ANSWERS)
