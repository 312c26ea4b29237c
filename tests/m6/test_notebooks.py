"""Notebook 07: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M6. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import notebook_checks

pytestmark = pytest.mark.m6

(SOURCE,) = notebook_checks.sources("07")

ANSWERS = {
    '''    """The hashes of the full blocks, six hex digits each."""''': """
    parent, found = ROOT_HASH, []
    for first in range(0, len(tokens) // block_size * block_size, block_size):
        packed = b"".join(token.to_bytes(4, "little") for token in tokens[first : first + block_size])
        parent = hashlib.sha256(parent + packed).digest()
        found.append(parent.hex()[:6])
    return found""",
    '''    """The number of cached tokens that the request need not compute."""''': """
    return min(num_equal, prompt_len - 1) // block_size * block_size""",
    "my_queue = None": "my_queue = [5, 6, 3, 2, 4, 1]",
}


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """With right answers to its tasks. It rejects wrong ones."""
    notebook_checks.check_tasks(SOURCE, monkeypatch, ANSWERS)


@pytest.mark.parametrize(("source", "turn"), notebook_checks.turns_of("07"))
def test_no_other_value_of_a_knob_breaks_it(
    source: Path, turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook_checks.check_turned(source, turn, monkeypatch)


def test_the_committed_notebook_is_its_source() -> None:
    notebook_checks.check_committed(SOURCE)


def test_it_asks_and_checks() -> None:
    notebook_checks.check_asks(SOURCE)
