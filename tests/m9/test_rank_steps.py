"""A rank skips steps after one that raised, in a process of MultiprocExecutor and in an actor of RayExecutor alike."""

from typing import Any

import pytest

from folovllm.parallel import ParallelConfig
from folovllm.worker.rank_steps import RankSteps

pytestmark = pytest.mark.m9


class Worker:
    """Raises in the steps whose numbers are in `bad`."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.log = bad, list[str]()

    def step(self, number: Any) -> Any:
        self.log.append(f"step {number}")
        if number in self.bad:
            raise ValueError(f"step {number} cannot be computed")
        return number

    def skip(self, number: Any) -> None:
        self.log.append(f"skip {number}")

    def calls(self) -> Any:
        return {"tp": {}, "pp": {"send": len(self.log)}}


def run(steps: RankSteps, number: Any) -> Any:
    try:
        return steps.step(number)
    except ValueError as error:
        return str(error)


def test_after_an_error_steps_are_skipped_until_the_calls_are_asked_for() -> None:
    worker = Worker(2, 4)
    steps = RankSteps(worker)
    first = "step 2 cannot be computed"
    assert [run(steps, number) for number in (1, 2, 3, 4)] == [1, first, first, first]
    assert steps.calls() == {"tp": {}, "pp": {"send": 4}}
    assert [run(steps, number) for number in (4, 5)] == ["step 4 cannot be computed"] * 2
    steps.calls()
    assert run(steps, 6) == 6
    assert worker.log == ["step 1", "step 2", "skip 3", "skip 4", "step 4", "skip 5", "step 6"]


@pytest.mark.parametrize(("tp", "pp", "rank"), [(1, 1, 0), (2, 1, 0), (1, 3, 2), (2, 3, 4)])
def test_the_first_rank_of_the_last_stage_answers(tp: int, pp: int, rank: int) -> None:
    assert ParallelConfig(tp, pp).answering_rank == rank
