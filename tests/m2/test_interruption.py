"""An exception at any line leaves an engine that answers as before, and the exception is the one that came.

vLLM issue 17738: after Ctrl-C in generate(), later requests hang or see an inconsistent state. Here an exception is
raised at the lines of the engine one after another, in a small scenario that has everything: chunked prompts, prefix
hits with copied blocks, preemption, n = 2, a stop string, aborts, a trace, and a stream that stays open beside it.
"""

import contextlib
import gc
import random
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.outputs import RequestOutput
from folovllm.parts import variants
from folovllm.request import RequestStatus
from folovllm.trace.lint import lint
from folovllm.trace.record import read_trace
from tests.core_helpers import AttendingExecutor
from tests.interruption import Moment, first_of_each, interrupted, moments_of

pytestmark = pytest.mark.m2

VOCAB = 264
SHARED = list(range(100, 110))
PROMPTS = [[*SHARED, *range(30, 50)], [*SHARED, 7], [9, 8], [*SHARED[:6], 3, 4]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
TWO = GREEDY.replace(n=2, temperature=1.0, seed=1)
NUM_SAMPLED = 60


class Boom(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture
def make_llm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], LLM]:
    """An LLM on the fake executor, which notices every wrong block. The pool is too small for all requests."""
    monkeypatch.setattr("folovllm.entrypoints.llm.make_executor", lambda *_: AttendingExecutor(vocab_size=VOCAB))

    def make(**args: Any) -> LLM:
        defaults = {
            "dtype": "float32", "max_model_len": 64, "block_size": 4, "num_kv_blocks": 19, "max_num_seqs": 8,
            "max_num_batched_tokens": 16, "partial_block_hits": True, "trace": str(tmp_path / "trace.jsonl"),
        }  # fmt: skip
        return LLM(str(folder), **(defaults | args))

    return make


def params_of(llm: LLM) -> list[SamplingParams]:
    """n = 2, a stop string that really comes, and plain ones."""
    text = generate(llm, [PROMPTS[2]], GREEDY)[0].outputs[0].text
    return [GREEDY, TWO, GREEDY.replace(stop=[text[3:5]]), GREEDY.replace(min_tokens=2)]


def generate(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def answers(outputs: list[RequestOutput]) -> list[Any]:
    return [[(c.index, c.token_ids, c.text, c.finish_reason) for c in output.outputs] for output in outputs]


class Scenario:
    """One engine that is interrupted again and again; after each time it must answer as it did at the beginning."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.params = params_of(llm)
        self.expected = answers(generate(llm, PROMPTS, self.params))
        self.expected_stream = self.read(self.open_stream())
        assert llm.stats().num_preemptions > 0 and llm.stats().prefix_cache_hits > 0

    def open_stream(self) -> Generator[RequestOutput]:
        return self.llm.stream([*SHARED, 1, 2], GREEDY.replace(max_tokens=20))

    @staticmethod
    def read(stream: Iterator[RequestOutput], count: int = 1000) -> list[int]:
        """The next `count` tokens."""
        tokens: list[int] = []
        for output in stream:
            tokens += output.outputs[0].token_ids
            if len(tokens) >= count:
                break
        return tokens

    def call(self) -> None:
        """What is interrupted: a whole generate(), then a stream that is left early."""
        generate(self.llm, PROMPTS, self.params)
        stream = self.llm.stream(PROMPTS[1], TWO)
        next(stream)
        stream.close()

    def interrupt(self, moment: Moment, error: BaseException, spared: str = "") -> None:
        stream = self.open_stream()
        tokens = self.read(stream, 3)
        caught: BaseException | None = None
        try:
            with interrupted(moment, error, spared) as at:
                self.call()
        except BaseException as raised:
            caught = raised
        where = f"{at} with {type(error).__name__}"
        assert caught is error if at else caught is None, f"{where}: {caught!r} came out"
        assert tokens + self.read(stream) == self.expected_stream, f"{where}: the open stream lost or changed tokens"
        self.check_idle(where)
        assert answers(generate(self.llm, PROMPTS, self.params)) == self.expected, where
        self.check_idle(where)

    def check_idle(self, where: str) -> None:
        llm, engine = self.llm, self.llm.llm_engine
        core = engine.engine_core
        assert not engine.has_unfinished_requests(), where
        core.step()  # tells the worker what has finished
        core.scheduler.check_integrity()
        assert not core.scheduler.has_requests() and engine.stats().kv_cache_usage == 0.0, where
        assert not engine.output_processor.states and not engine.output_processor.parents, where
        assert not llm._waited_for and not llm._mail and not llm._abandoned and not llm._lock.locked(), where
        assert isinstance(core.executor, FakeExecutor) and not core.executor.requests, where


def run_at(scenario: Scenario, moments: list[Moment], spared: str = "") -> None:
    for i, moment in enumerate(moments):
        scenario.interrupt(moment, Boom("at a line") if i % 2 else KeyboardInterrupt(), spared)


@pytest.mark.parametrize("policy", variants("core.request_queue"))
def test_at_some_lines(make_llm: Callable[..., LLM], policy: str) -> None:
    scenario = Scenario(make_llm(scheduling_policy=policy))
    moments = moments_of(scenario.call)
    assert len(first_of_each(moments)) > 400
    run_at(scenario, random.Random(policy).sample(first_of_each(moments), NUM_SAMPLED // 2))
    run_at(scenario, random.Random(policy).sample(moments, NUM_SAMPLED // 2))


@pytest.mark.slow
@pytest.mark.parametrize("index", ["hash", "trie"])
def test_at_every_line(make_llm: Callable[..., LLM], index: str) -> None:
    """The first time that a line runs, and another time."""
    scenario = Scenario(make_llm(prefix_index=index))
    moments = moments_of(scenario.call)
    run_at(scenario, first_of_each(moments))
    random.Random(index).shuffle(moments)
    run_at(scenario, list({moment[:2]: moment for moment in moments}.values()))


def test_a_request_whose_addition_is_interrupted_is_not_there(make_llm: Callable[..., LLM]) -> None:
    engine = make_llm().llm_engine
    engine.add_request("other", PROMPTS[0], GREEDY)
    for _ in range(2):
        engine.step()

    def add() -> None:
        engine.add_request("mine", PROMPTS[1], TWO)

    moments = first_of_each(moments_of(add))
    assert len(moments) > 60
    for moment in moments:
        engine.abort_request("mine")
        with contextlib.suppress(Boom), interrupted(moment, Boom()) as at:
            add()
        if not at:  # a line that only the first call runs
            continue
        assert list(engine.output_processor.states) == list(engine.engine_core.scheduler.requests) == ["other"], moment
        assert not engine.output_processor.parents
    engine.abort_request("mine")
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        tokens = [t for output in engine.step() for t in output.outputs[0].token_ids] or tokens
    assert tokens == fake_tokens(PROMPTS[0], GREEDY.max_tokens or 0, VOCAB)


def test_a_request_whose_abort_is_interrupted_is_gone(make_llm: Callable[..., LLM]) -> None:
    engine = make_llm().llm_engine

    def add_both() -> None:
        engine.add_request("other", PROMPTS[0], GREEDY)
        engine.add_request("mine", PROMPTS[1], TWO)
        engine.step()
        engine.step()

    def abort() -> None:
        engine.abort_request("mine")

    add_both()
    moments = first_of_each(moments_of(abort))
    engine.abort_request("other")
    num_gone = 0
    for moment in moments:
        add_both()
        with contextlib.suppress(Boom), interrupted(moment, Boom()):
            abort()
        in_front, in_core = list(engine.output_processor.states), list(engine.engine_core.scheduler.requests)
        assert in_front == in_core and in_front in (["other"], ["other", "0_mine", "1_mine"]), moment
        num_gone += in_front == ["other"]
        engine.abort_request(["mine", "other"])
        assert not engine.has_unfinished_requests() and engine.stats().kv_cache_usage == 0.0
        engine.engine_core.scheduler.check_integrity()
    assert num_gone > 60 and len(moments) - num_gone < 20, "all but the lines before anything was done"


class OnTorch(Scenario):
    """The same on a tiny model, with its worker."""

    def check_idle(self, where: str) -> None:
        engine = self.llm.llm_engine
        engine.engine_core.step()
        engine.engine_core.scheduler.check_integrity()
        assert not engine.has_unfinished_requests() and engine.stats().kv_cache_usage == 0.0, where
        executor: Any = engine.engine_core.executor
        runner = executor.worker.model_runner
        assert not runner.requests and not runner.batch.req_ids and not runner.num_prompt_logprobs, where


def on_torch(folder: Path) -> OnTorch:
    return OnTorch(
        LLM(
            str(folder), dtype="float32", max_model_len=64, block_size=4, num_kv_blocks=19, max_num_seqs=8,
            max_num_batched_tokens=16, partial_block_hits=True,
        )
    )  # fmt: skip


def test_at_some_lines_of_the_worker(folder: Path) -> None:
    scenario = on_torch(folder)
    in_worker = [moment for moment in first_of_each(moments_of(scenario.call)) if "/worker/" in moment[0]]
    assert len(in_worker) > 80
    run_at(scenario, random.Random(0).sample(in_worker, 25))


@pytest.mark.slow
def test_at_every_line_of_the_worker(folder: Path) -> None:
    scenario = on_torch(folder)
    moments = [m for m in moments_of(scenario.call) if "/worker/" in m[0] or "/executor/" in m[0]]
    run_at(scenario, first_of_each(moments))
    run_at(scenario, random.Random(0).sample(moments, 100))


def test_the_trace_tells_of_steps_that_failed(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    """Whatever is interrupted but the writer itself, the trace goes on, is complete, and breaks no rule."""
    scenario = Scenario(make_llm())
    run_at(scenario, random.Random(1).sample(moments_of(scenario.call), 20), spared="/trace/")
    scenario.llm.shutdown()
    trace = read_trace(tmp_path / "trace.jsonl")
    assert trace.end is not None and not lint(trace)
    assert any(event[0] == "requeue" for record in trace.steps for event in record["events"])


def test_a_trace_that_cannot_be_written_disturbs_nobody(make_llm: Callable[..., LLM], tmp_path: Path) -> None:
    llm = make_llm()
    expected = answers(generate(llm, PROMPTS, GREEDY))
    path = tmp_path / "trace.jsonl"
    before = read_trace(path)
    trace: Any = llm.llm_engine.engine_core.trace

    class FullDisk:
        name, closed = str(path), False

        def write(self, _: str) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.closed = True

    trace._file.close()
    trace._file = FullDisk()
    assert answers(generate(llm, PROMPTS, GREEDY)) == expected
    llm.shutdown()
    assert read_trace(path).steps == before.steps


def test_a_repair_that_is_interrupted_is_done_again(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception that comes out is still the first one; Ctrl-C during the repair waits until it is done."""
    scenario = Scenario(make_llm())
    scheduler, first = scenario.llm.llm_engine.engine_core.scheduler, Boom("the first")
    recover, calls = scheduler.recover, []

    def interrupted_recover(ended: Any, status: RequestStatus) -> None:
        calls.append(status)
        if len(calls) == 1:
            recover(ended, status)
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)
        recover(ended, status)
        calls.append("whole")

    def fail(*_: Any) -> None:
        raise first

    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(len(calls)))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "recover", interrupted_recover)
            patch.setattr(scheduler, "_make_output", fail)
            with pytest.raises(Boom) as caught:
                generate(scenario.llm, PROMPTS, scenario.params)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value is first and len(calls) == 3 and pressed == [3], "Ctrl-C came when all was done"
    scenario.check_idle("")
    assert answers(generate(scenario.llm, PROMPTS, scenario.params)) == scenario.expected


def test_an_engine_that_could_not_be_made_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are gone, the settings of torch are as before, and the trace's file is closed."""
    parts: list[weakref.ref[Any]] = []
    gc.unfreeze()  # tests/conftest.py has frozen the tests themselves

    def fail(engine: Any, *_: Any, **__: Any) -> None:
        parts.append(weakref.ref(engine))
        raise KeyboardInterrupt

    torch.set_default_dtype(torch.float64)
    try:
        for where in ("worker.model_runner.ModelRunner", "core.sched.scheduler.Scheduler", "engine.core.make_trace"):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                owner = where if where.endswith("trace") else f"{where}.__init__"
                patch.setattr(f"folovllm.{owner}", fail if owner != where else lambda *_: fail(open))
                LLM(str(folder), dtype="float32", max_model_len=64, trace=str(tmp_path / "t.jsonl"))
            assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    gc.collect()
    assert [part() for part in parts[:2]] == [None, None] and gc.get_freeze_count() == 0
