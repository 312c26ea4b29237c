"""The notebooks of M1 to M3: each runs in fast mode, checks itself, and is committed as its source builds it.

What is checked: tests/notebook_checks.py. Later milestones test their own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import notebook_checks

MILESTONE = {"00": pytest.mark.m1, "01": pytest.mark.m1, "03": pytest.mark.m2, "04": pytest.mark.m3}
NOTEBOOKS = [
    pytest.param(source, id=source.stem, marks=MILESTONE[source.stem[:2]])
    for source in notebook_checks.sources(*MILESTONE)
]


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_runs_and_its_asserts_hold(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook_checks.run_fast(source, monkeypatch)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_the_committed_notebook_is_its_source(source: Path) -> None:
    notebook_checks.check_committed(source)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_asks_and_checks(source: Path) -> None:
    notebook_checks.check_asks(source)
