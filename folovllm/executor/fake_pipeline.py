"""FakePipeline: the fake model divided into stages, with several steps in flight, strict about their order.

Milestone: M9. vLLM counterpart: none. Every stage is a FakeExecutor with slots of its own, since each stage of a real
pipeline has the KV cache of its layers. A step visits the stages one after another, and each stage runs the steps in
the order in which they were started. Between those limits anything may happen at any time:

    stage 0    S1   S2        S3             S2 may reach stage 0 before S1 has reached stage 1, or after,
    stage 1         S1   S2        S3        but S2 never overtakes S1 anywhere

`rng` decides how far the stages get before the engine asks for an answer. Without it they get nowhere, so whatever the
scheduler decided meanwhile, such as giving a block to another request, is decided before the older step touches it.

After each step every stage checks all tokens of the step's requests, from the first to the last: each slot must hold
the digest of exactly that sequence, which the stage knows by the messages alone. Row 1: no torch.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.base import Executor
from folovllm.executor.fake import ROOT, FakeExecutor, mix
from folovllm.outputs import ModelRunnerOutput

Fault = Callable[[SchedulerOutput, int], bool]  # (step, stage) -> whether that stage raises in that step


@dataclass(eq=False)
class FakeStep:
    """A step on its way through the stages."""

    scheduler_output: SchedulerOutput
    num_stages_done: int = 0
    answer: ModelRunnerOutput | None = None  # of the last stage
    error: Exception | None = None  # of any stage; the later ones are passed over


class FakeStage(FakeExecutor):
    """One stage. It attends to every slot of a sequence, and samples only if it is the last."""

    def run(self, output: SchedulerOutput, is_last: bool) -> ModelRunnerOutput | None:
        self.execute(output)
        for request_id in output.num_scheduled_tokens:
            self._attend(request_id)
        return self.sample(output) if is_last else None

    def _attend(self, request_id: str) -> None:
        state, digest = self.requests[request_id], ROOT
        for position in range(state.num_computed_tokens):
            digest = mix(digest, state.token_ids[position])
            assert self._read(state, position) == digest, f"{request_id}: slot of position {position} was overwritten"


class FakePipeline(Executor):
    """`num_stages` stages. `fault` may make a stage raise; the exception comes out of `sample`."""

    def __init__(
        self,
        num_stages: int,
        vocab_size: int = 1000,
        rng: random.Random | None = None,
        fault: Fault = lambda output, stage: False,
    ) -> None:
        self.stages = [FakeStage(vocab_size) for _ in range(num_stages)]
        self.rng, self.fault = rng, fault
        self.in_flight: list[FakeStep] = []  # oldest first
        # For tests: how many steps were in flight after each start, and the steps whose answer was not wanted.
        self.num_in_flight: list[int] = []
        self.discarded: list[FakeStep] = []

    def available_kv_cache_bytes(self) -> int:
        return self.stages[0].available_kv_cache_bytes()

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        for stage in self.stages:
            stage.initialize_kv_cache(kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> FakeStep:
        assert len(self.in_flight) < len(self.stages), "more steps in flight than stages"
        assert not (self.in_flight and scheduler_output.is_empty), "an empty step would occupy a stage for nothing"
        self.in_flight.append(step := FakeStep(scheduler_output))
        self.num_in_flight.append(len(self.in_flight))
        while self.rng is not None and self._movable() and self.rng.random() < 0.5:
            self._move(self.rng.choice(self._movable()))
        return step

    def sample(self, handle: FakeStep) -> ModelRunnerOutput:
        assert handle is self.in_flight[0], "answers are taken in the order in which the steps were started"
        self._finish(handle)
        if handle.error is not None:
            raise handle.error
        assert handle.answer is not None
        return handle.answer

    def discard(self, handle: FakeStep) -> None:
        if handle in self.in_flight:
            self._finish(handle)
            self.discarded.append(handle)

    def _finish(self, step: FakeStep) -> None:
        """Runs the stages, in any possible order, until the last one is done with `step`."""
        while step.num_stages_done < len(self.stages):
            self._move(self._movable()[0] if self.rng is None else self.rng.choice(self._movable()))
        self.in_flight.remove(step)

    def _movable(self) -> list[FakeStep]:
        """The steps whose next stage is free: no older step has still to visit it. The oldest is among them."""
        steps, movable, limit = self.in_flight, [], len(self.stages)
        for step in steps:
            if step.num_stages_done < limit:
                movable.append(step)
            limit = step.num_stages_done
        return movable

    def _move(self, step: FakeStep) -> None:
        """The next stage runs `step`."""
        stage, step.num_stages_done = step.num_stages_done, step.num_stages_done + 1
        if step.error is not None:
            return
        try:
            if self.fault(step.scheduler_output, stage):
                raise RuntimeError(f"a fault in stage {stage}")
            step.answer = self.stages[stage].run(step.scheduler_output, is_last=stage == len(self.stages) - 1)
        except Exception as error:
            step.error = error
