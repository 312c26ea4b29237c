"""Notebook 08: it runs in fast mode, checks itself, asks, is what its source builds, and its tasks can be done.

Milestone: M7. vLLM counterpart: none. What is checked: tests/notebook_checks.py.
"""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from folovllm import viz
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


def nearest_levels(weights: list[float], scale: float, zero: int, max_level: int) -> list[int]:
    return [min(max(round(w / scale) + zero, 0), max_level) for w in weights]


def one_step(weights: list[float], i: int, rounded: float, u: list[float]) -> list[float]:
    error = (weights[i] - rounded) / u[i]
    return [w if j < i else w - error * u[j] for j, w in enumerate(weights)]


def pack_word(levels: list[int]) -> int:
    return sum(level << (4 * i) for i, level in enumerate(levels))


@pytest.mark.parametrize("solution", [nearest_levels, one_step, pack_word])
def test_a_right_answer_to_each_task_passes(solution: Callable[..., object]) -> None:
    cells = notebook_checks.build_notebooks.read_source(SOURCE).cells
    (task,) = [cell.source for cell in cells if f"def {solution.__name__}(" in cell.source]
    check = task[task.index("viz.your_turn(") :]
    verdict = eval(check.replace("  # fmt: skip", ""), {"viz": viz, solution.__name__: solution})
    assert "Passed" in repr(verdict), verdict
