"""Notebook 08: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M7. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

import warnings
from collections.abc import Iterator

import pytest
import torch

from tests import notebook_checks

pytestmark = pytest.mark.m7

(SOURCE,) = notebook_checks.sources("08")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Pictures go nowhere; what the notebook does to threads and warnings ends with it."""
    threads = torch.get_num_threads()
    with notebook_checks.pictures_go_nowhere(), warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook_checks.run_fast(SOURCE, monkeypatch)


def test_the_committed_notebook_is_its_source() -> None:
    notebook_checks.check_committed(SOURCE)


def test_it_asks_and_checks() -> None:
    notebook_checks.check_asks(SOURCE)
