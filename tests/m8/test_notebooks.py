"""Notebook 10: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M8. vLLM counterpart: none. What is checked: tests/notebook_checks.py. In fast mode the engine's process runs
a tiny model of random weights. Requests arrive in real time, so a run takes a quarter of a minute: .ci/run has it.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import notebook_checks

pytestmark = pytest.mark.m8

(SOURCE,) = notebook_checks.sources("10")
ANSWERS = {
    '''    """Both lists are sorted. Visits that find nothing give no output."""
    return None  # your code''': """
    sizes, taken = [], 0
    for visit in visits:
        here = sum(moment <= visit for moment in arrivals)
        if here > taken:
            sizes.append(here - taken)
        taken = here
    return sizes""",
    '''    """Two lists of equal length. The server is empty before the first arrival and after `seconds`."""
    return None  # your code''': """
    return (sum(ends) - sum(arrivals)) / seconds""",
    "my_queue = None": "my_queue = max(QUEUES, key=lambda n: serve(offered(HIGH), max_queue=n).good_share)",
}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Pictures go nowhere; the notebook silences the engine's log."""
    logger = logging.getLogger("folovllm")
    level = logger.level
    with notebook_checks.pictures_go_nowhere():
        yield
    logger.setLevel(level)


@pytest.mark.slow
def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """With right answers to its tasks. It rejects wrong ones."""
    notebook_checks.check_tasks(SOURCE, monkeypatch, ANSWERS)


@pytest.mark.parametrize(("source", "turn"), notebook_checks.turns_of("10"))
def test_no_other_value_of_a_knob_breaks_it(
    source: Path, turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook_checks.check_turned(source, turn, monkeypatch)


def test_the_committed_notebook_is_its_source() -> None:
    notebook_checks.check_committed(SOURCE)


def test_it_asks_and_checks() -> None:
    notebook_checks.check_asks(SOURCE)
