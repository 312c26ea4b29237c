"""RankSteps: the steps of one rank, also after one that raised.

Milestone: M9. vLLM counterpart: none; there, an exception in a worker ends the engine.
"""

from typing import Any

from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.rank_messages import Calls
from folovllm.outputs import ModelRunnerOutput


class RankSteps:
    """Runs the steps of a rank's worker.

    After a step that raised, a rank skips all further steps until it is asked for its `calls`. The other ranks may
    still wait for it in the middle of that step, and must not meet the calls of a later one.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._error: Exception | None = None  # of the step that raised

    def step(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Computes a step. Raises what the worker raises, and the same again for each step that is skipped."""
        if self._error is not None:
            self._worker.skip(scheduler_output)
            raise self._error
        try:
            output: ModelRunnerOutput = self._worker.step(scheduler_output)
        except Exception as error:
            self._error = error
            raise
        return output

    def calls(self) -> Calls:
        """What this rank has said to the others since the start. From now on it computes steps again."""
        calls: Calls = self._worker.calls()
        self._error = None
        return calls
