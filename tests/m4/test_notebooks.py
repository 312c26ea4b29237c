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
ANSWERS_02 = {
    '''    """Replace the line below. `peak` is in FLOP/s, `bandwidth` in bytes/s."""
    return None''': """
    return peak / bandwidth * bytes_per_weight / 2""",
    "my_sequences = None": "my_sequences = weights_bytes // (1000 * kv_bytes)",
    "my_ms = None": "my_ms = arch.num_parameters() / 2 / REFERENCE.bandwidth * 1000",
}
NOTEBOOKS = [pytest.param(source, id=source.stem) for source in notebook_checks.sources(*NUMBERS)]


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


def test_both_are_there() -> None:
    assert len(NOTEBOOKS) == len(NUMBERS)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_runs_and_its_asserts_hold(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.get_default_dtype()
    notebook_checks.run_fast(source, monkeypatch)
    assert torch.get_default_dtype() is dtype, "it must leave torch as it found it"


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_the_committed_notebook_is_its_source(source: Path) -> None:
    notebook_checks.check_committed(source)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_asks_and_checks(source: Path) -> None:
    notebook_checks.check_asks(source)


def test_the_tasks_of_02_accept_right_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = notebook_checks.sources("02")
    notebook_checks.check_tasks(source, monkeypatch, ANSWERS_02)
