"""Notebook 06: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M5. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

from collections.abc import Iterator

import pytest

from tests import notebook_checks

pytestmark = pytest.mark.m5

(SOURCE,) = notebook_checks.sources("06")


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
