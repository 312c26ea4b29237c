"""An id that comes back while the step of its old owner runs, and last outputs that must not get lost.

Found by random schedules: a request was aborted while its step ran, and a new one took its id at once. When the step
then failed, it took the new one with it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.outputs import ModelRunnerOutput, RequestOutput
from folovllm.request import Request, RequestStatus
from folovllm.sampling_params import RequestOutputKind
from folovllm.trace.header import make_header
from folovllm.trace.lint import lint
from folovllm.trace.writer import TraceWriter
from tests import core_helpers as helpers
from tests.core_helpers import AttendingExecutor, make_config, make_core, make_request

pytestmark = pytest.mark.m2

FINAL_ONLY = RequestOutputKind.FINAL_ONLY


class MeddlingExecutor(AttendingExecutor):
    """Calls `meddle` once, in `execute` or in `sample`, and then fails if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.moment = ""
        self.meddle: Callable[[], None] = lambda: None
        self.fails = False

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        self._maybe("execute")
        return super().execute(scheduler_output)

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        self._maybe("sample")
        return super().sample(handle)

    def _maybe(self, moment: str) -> None:
        if moment == self.moment:
            self.moment = ""
            self.meddle()
            if self.fails:
                raise RuntimeError("the device is gone")


@pytest.mark.parametrize("steps_before", [0, 1, 2])
@pytest.mark.parametrize("moment", ["execute", "sample"])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("caching", [True, False])
def test_a_new_request_under_the_id_of_an_aborted_one(
    moment: str, steps_before: int, fails: bool, caching: bool, tmp_path: Path
) -> None:
    config, executor = make_config(num_kv_blocks=12, enable_prefix_caching=caching), MeddlingExecutor()
    core = EngineCore(config, executor)
    path = tmp_path / "trace.jsonl"
    core.trace = TraceWriter(path, make_header(config, core.kv_cache_config))
    old, other = make_request("a", [1, 2, 3, 4, 5], max_tokens=6), make_request("b", 5, max_tokens=6)
    new = make_request("a", [1, 2, 3, 4, 9], max_tokens=3)
    helpers.add_all(core, [old, other])
    for _ in range(steps_before):
        core.step()

    def meddle() -> None:
        core.abort_requests(["a"])
        core.add_request(new)

    executor.moment, executor.meddle, executor.fails = moment, meddle, fails
    if fails:
        with pytest.raises(RuntimeError, match="the device is gone"):
            core.step()
        assert other.status == RequestStatus.FINISHED_ERROR
    else:
        assert [output.request_id for output in core.step()] == ["b"]
    assert old.status == RequestStatus.FINISHED_ABORTED and old.num_output_tokens == steps_before
    assert new.status == RequestStatus.WAITING and not new.output_token_ids
    helpers.drive(core)
    assert new.output_token_ids == fake_tokens([1, 2, 3, 4, 9], 3)
    core.step()
    assert not executor.requests
    helpers.assert_nothing_leaked(core)
    core.shutdown()
    assert not lint(path)


def test_blame_goes_by_request_and_the_others_go_on() -> None:
    """b is blamed: a, in the same step, computes again what it had and loses nothing."""
    executor = MeddlingExecutor()
    core = make_core(executor, num_kv_blocks=12, enable_prefix_caching=True)
    a, b = make_request("a", 6, max_tokens=5), make_request("b", 7, max_tokens=5)
    helpers.add_all(core, [a, b])
    got = helpers.tokens_of(output for output in core.step() if output.request_id == "a")
    executor.moment, executor.fails = "sample", True
    with pytest.raises(RuntimeError):
        core.step(blamed=["b", "nobody"])
    assert b.status == RequestStatus.FINISHED_ERROR and a.status == RequestStatus.WAITING
    core.scheduler.check_integrity()
    outputs = helpers.drive(core)
    assert list(outputs) == ["a"]
    assert got + helpers.tokens_of(outputs["a"]) == fake_tokens(a.prompt_token_ids, 5)
    stats = core.stats()
    assert stats.preempted_prefix_cache_hits == 4, "what earlier steps have computed is still cached"
    assert stats.prefix_cache_queries == 6 + 7, "its second lookup is not counted as a new request's"


def test_nothing_is_counted_where_nothing_is_looked_up() -> None:
    core = make_core(num_kv_blocks=5)
    helpers.add_all(core, [make_request("a", 7, max_tokens=5), make_request("b", 8, max_tokens=5)])
    helpers.drive(core)
    stats = core.stats()
    assert stats.num_preemptions > 0
    assert (stats.prefix_cache_queries, stats.preempted_prefix_cache_queries, stats.prefix_cache_hit_rate) == (0, 0, 0)


# ---- several completions, one of which is aborted or fails


@pytest.fixture
def llm(tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr("folovllm.entrypoints.llm.make_executor", lambda *_: MeddlingExecutor())
    return LLM(str(tiny_model_dir("llama")), dtype="float32", max_model_len=64, block_size=4, max_num_seqs=1)


def start(llm: LLM, kind: RequestOutputKind) -> list[RequestOutput]:
    """Two completions with one seat: the first has finished when the second has one token."""
    params = SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True, output_kind=kind, detokenize=False)
    llm.llm_engine.add_request("p", [5, 6, 7], params)
    return [output for _ in range(4) for output in llm.llm_engine.step()]


def how_it_ended(outputs: list[RequestOutput]) -> list[Any]:
    return [
        (o.request_id, o.finished, [(c.index, len(c.token_ids), c.finish_reason) for c in o.outputs]) for o in outputs
    ]


@pytest.mark.parametrize("request_id", ["p", "1_p"])
def test_an_aborted_sibling_loses_no_finished_output(llm: LLM, request_id: str) -> None:
    engine = llm.llm_engine
    assert start(llm, FINAL_ONLY) == []
    engine.abort_request(request_id)
    assert engine.has_unfinished_requests() and engine.has_request("p")
    assert how_it_ended(engine.step()) == [("p", True, [(0, 3, "length"), (1, 1, "abort")])]
    assert not engine.has_unfinished_requests() and not engine.has_request("p") and engine.step() == []


def test_a_failed_sibling_loses_no_finished_output(llm: LLM) -> None:
    engine = llm.llm_engine
    executor = engine.engine_core.executor
    assert start(llm, FINAL_ONLY) == [] and isinstance(executor, MeddlingExecutor)
    executor.moment, executor.fails = "execute", True
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()
    assert how_it_ended(engine.step()) == [("p", True, [(0, 3, "length"), (1, 1, "error")])]
    assert not engine.has_unfinished_requests()


def test_a_sibling_aborted_first_is_reported_with_the_one_that_goes_on(llm: LLM) -> None:
    engine = llm.llm_engine
    params = SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True, output_kind=FINAL_ONLY, detokenize=False)
    engine.add_request("p", [5, 6, 7], params)
    engine.step()
    engine.abort_request("0_p")
    outputs = [output for _ in range(4) for output in engine.step()]
    assert how_it_ended(outputs) == [("p", True, [(0, 1, "abort"), (1, 3, "length")])]


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
def test_a_streamed_request_says_that_it_is_over(llm: LLM, kind: RequestOutputKind) -> None:
    engine = llm.llm_engine
    assert not any(output.finished for output in start(llm, kind))
    engine.abort_request("p")
    (output,) = engine.step()
    assert output.finished and [c.finish_reason for c in output.outputs] == ["abort"]


def test_a_request_without_finished_siblings_says_nothing_when_it_is_aborted(llm: LLM) -> None:
    engine = llm.llm_engine
    params = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False, temperature=0.0)
    engine.add_request("p", [5, 6, 7], params.replace(n=2, temperature=1.0, output_kind=FINAL_ONLY))
    engine.add_request("q", [5, 6, 7], params)
    engine.step()
    engine.abort_request(["p", "q"])
    assert not engine.has_unfinished_requests() and engine.step() == []


def test_an_id_that_only_the_core_knows_adds_nothing(llm: LLM) -> None:
    """The front end knows no "x", the core does. A request that is refused must not leave half of itself anywhere."""
    engine = llm.llm_engine
    mine = Request("1_x", [5, 6], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    engine.engine_core.add_request(mine)
    params = SamplingParams(n=2, max_tokens=3, output_kind=FINAL_ONLY)
    with pytest.raises(ValueError, match="'1_x' is already in use"):
        engine.add_request("x", [5, 6, 7], params)
    assert not engine.output_processor.states and not engine.output_processor.parents
    assert list(engine.engine_core.scheduler.requests) == ["1_x"] and not mine.is_finished
