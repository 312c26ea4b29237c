"""An exception at any line of LLM.generate() while steps are in flight: the engine answers as before.

The scenario of tests/m2/test_interruption.py (chunked prompts, hits with copied blocks, preemption, n = 2, a stop
string, aborts, a stream that stays open) on a pipeline of two fake stages.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM
from folovllm.executor.fake_pipeline import FakePipeline
from tests.interruption import first_of_each, moments_of
from tests.m2.test_interruption import VOCAB, Scenario, run_at

pytestmark = pytest.mark.m9


class PipelineScenario(Scenario):
    def check_idle(self, where: str) -> None:
        engine = self.llm.llm_engine
        core = engine.engine_core
        assert not engine.has_unfinished_requests() and not core._in_flight, where
        core.step()  # tells the stages what has finished
        core.scheduler.check_integrity()
        assert not core.scheduler.has_requests() and engine.stats().kv_cache_usage == 0.0, where
        assert not engine.output_processor.states and not engine.output_processor.parents, where
        assert isinstance(core.executor, FakePipeline) and not core.executor.in_flight, where
        assert not any(stage.requests for stage in core.executor.stages), where


@pytest.fixture
def scenario(tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> PipelineScenario:
    monkeypatch.setattr("folovllm.entrypoints.llm.make_executor", lambda *_: FakePipeline(2, VOCAB))
    args: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 64, "block_size": 4, "num_kv_blocks": 19, "max_num_seqs": 8,
        "max_num_batched_tokens": 16, "partial_block_hits": True, "pipeline_parallel_size": 2,
    }  # fmt: skip
    return PipelineScenario(LLM(str(tiny_model_dir("llama")), **args))


def test_at_some_lines(scenario: PipelineScenario) -> None:
    executor: Any = scenario.llm.llm_engine.engine_core.executor
    assert max(executor.num_in_flight) == 2
    # What an executor does when it is interrupted itself is its own matter.
    moments = [moment for moment in moments_of(scenario.call) if "/executor/" not in moment[0]]
    run_at(scenario, random.Random(0).sample(first_of_each(moments), 25))
    run_at(scenario, random.Random(0).sample(moments, 25))
