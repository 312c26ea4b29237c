"""MultiprocExecutor: one process per rank. Each step is one message to all of them, and one of them answers.

Milestone: M9. vLLM counterpart: vllm/v1/executor/multiproc_executor.py.
Left out: ranks on other machines (RayExecutor has them), answers through shared memory, one thread per call.

The first rank of the last stage answers; the other ranks of its stage have sampled the same tokens. What an error in a
rank means is in ranks.py.

    core:    execute(a)  execute(b)  sample(a)    execute(c)  sample(b)        two stages, two batches in flight
    stage 0  [ forward a ][ forward b ]           [ forward c ]
    stage 1               [ forward a, sample ]   [ forward b, sample ]
"""

import itertools
import time
import weakref
from pathlib import Path
from typing import Any, NoReturn

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.rank_messages import Answer, Ask, Failed, Step
from folovllm.executor.rank_processes import RankProcesses
from folovllm.executor.ranks import CALL_SECONDS, START_SECONDS, STEP_SECONDS, RanksExecutor
from folovllm.outputs import ModelRunnerOutput

HEALTH_CHECK_SECONDS = 1.0
MAKE_WORKER = "folovllm.worker.worker_process:make_worker"


class MultiprocExecutor(RanksExecutor):
    """Starts the ranks of a resolved config. `worker_factory` replaces the real worker, for tests: "module:function".

    Raises ValueError if a rank refuses the config, and ExecutorDeadError if a rank ends.
    """

    health_check_seconds = HEALTH_CHECK_SECONDS
    name_of_ranks = "processes"

    def __init__(self, config: EngineConfig, model_path: Path, worker_factory: str = MAKE_WORKER) -> None:
        super().__init__(config)
        self._numbers = itertools.count(1)  # of messages; number 0 says that a rank is ready
        self._answers: dict[int, dict[int, Answer]] = {0: {}}  # number of a message -> rank -> answer
        self._ranks = RankProcesses(config, model_path, _threads_per_rank(config), worker_factory)
        self._close = weakref.finalize(self, self._ranks.close)
        try:
            self._collect(0, START_SECONDS, f"the ranks were not ready after {START_SECONDS:g} s")
            if config.device == "cpu":
                self._ranks.all_have_met()  # NCCL needs the rendezvous again, when two ranks first talk to each other
        except BaseException:
            self.shutdown()
            raise

    @property
    def process_ids(self) -> list[int]:
        """The processes of the ranks, in order."""
        return self._ranks.process_ids

    # ---- the interface

    def check_health(self) -> None:
        self._ranks.check()

    def shutdown(self) -> None:
        """Ends the ranks, also in the middle of a step."""
        self._close()

    # ---- steps

    def _start_step(self, scheduler_output: SchedulerOutput) -> int:
        """The key of a step is the number of its message."""
        number = next(self._numbers)
        self._answers[number] = {}
        self._ranks.send(Step(number, scheduler_output), STEP_SECONDS)
        return number

    def _finish_step(self, key: int) -> ModelRunnerOutput:
        try:
            answer = self._wait_for_step(key)
        finally:
            self._forget(key)
        output: ModelRunnerOutput = _value(answer)
        return output

    def _wait_for_step(self, number: int) -> Answer:
        deadline = time.monotonic() + STEP_SECONDS
        while (answer := self._step_answer(number)) is None:
            rank, latest = self._receive(deadline, f"a step has not ended in {STEP_SECONDS:g} s")
            if isinstance(latest, Failed):
                self._check_in_step(f"rank {rank}", latest.error)
        return answer

    def _step_answer(self, number: int) -> Answer | None:
        """A step has failed if it has failed in one rank."""
        answers = self._answers[number]
        failures = [answer for answer in answers.values() if isinstance(answer, Failed)]
        return failures[0] if failures else answers.get(self._parallel.answering_rank)

    def _forget(self, number: int) -> None:
        """Nothing waits for this step any more, nor for an older one: its `sample` was never called."""
        for old in [n for n in self._answers if n <= number]:
            del self._answers[old]

    def _die(self, cause: str) -> NoReturn:
        self._ranks.die(cause)
        self._ranks.check()
        raise AssertionError("the ranks have died without a cause")

    # ---- calls

    def collective_rpc(
        self, name: str, *args: Any, seconds: float = CALL_SECONDS, too_late: str | None = None
    ) -> list[Any]:
        number = next(self._numbers)
        self._answers[number] = {}
        self._ranks.send(Ask(number, name, args), seconds)
        return self._collect(number, seconds, too_late or f"the ranks have not answered {name}() in {seconds:g} s")

    def _collect(self, number: int, seconds: float, too_late: str) -> list[Any]:
        """Waits until all ranks have answered a message. Raises at once what one of them has raised."""
        deadline, answers = time.monotonic() + seconds, self._answers[number]
        values: dict[int, Any] = {}
        try:
            while len(values) < self._parallel.world_size:
                self._receive(deadline, too_late)
                values = {rank: _value(answer) for rank, answer in answers.items()}
        finally:
            del self._answers[number]
        return [values[rank] for rank in range(self._parallel.world_size)]

    def _receive(self, deadline: float, too_late: str) -> tuple[int, Answer]:
        rank, answer = self._ranks.receive(deadline, too_late)
        if answer.number in self._answers:  # otherwise the step was interrupted, and nothing waits for its answer
            self._answers[answer.number][rank] = answer
        return rank, answer


def _value(answer: Answer) -> Any:
    if isinstance(answer, Failed):
        raise answer.error
    return answer.value


def _threads_per_rank(config: EngineConfig) -> int:
    """`cpu_threads` each, or the threads of this process, divided among the ranks."""
    from folovllm.platforms import default_threads

    return config.cpu_threads or max(1, default_threads().number // config.parallel_config.world_size)
