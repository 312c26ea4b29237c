"""Builders for tests of several steps in flight: a core on a FakePipeline. No torch, no weights."""

import random
from collections.abc import Mapping
from typing import Any

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.fake_pipeline import FakePipeline, Fault
from tests import core_helpers as helpers


def pipeline_core(
    num_stages: int = 2,
    vocab_size: int = 1000,
    rng: random.Random | None = None,
    fault: Fault = lambda output, stage: False,
    **args: Any,
) -> tuple[EngineCore, FakePipeline]:
    """Blocks of 4 tokens, 32 blocks, texts of 32 tokens, unless `args` say otherwise."""
    executor = FakePipeline(num_stages, vocab_size, rng, fault)
    defaults = {"max_model_len": 32, "num_kv_blocks": 33, "pipeline_parallel_size": num_stages}
    return helpers.make_core(executor, **defaults | args), executor


def in_flight(executor: FakePipeline) -> list[dict[str, int]]:
    """What was scheduled in the steps in flight, oldest first."""
    return [dict(step.scheduler_output.num_scheduled_tokens) for step in executor.in_flight]


class Started:
    """Wraps `schedule` and keeps what was really started, in order."""

    def __init__(self, executor: FakePipeline) -> None:
        self.outputs: list[SchedulerOutput] = []
        execute = executor.execute

        def noting(output: SchedulerOutput) -> Any:
            self.outputs.append(output)
            return execute(output)

        executor.execute = noting  # type: ignore[method-assign]

    @property
    def steps(self) -> list[Mapping[str, int]]:
        return [output.num_scheduled_tokens for output in self.outputs]
