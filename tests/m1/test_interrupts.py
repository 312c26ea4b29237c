"""Ctrl-C waits for the end of a step, and the caller's own handler gets it then, whatever that handler is.

Public reports: vLLM issue 17738 (Ctrl-C in generate() leaves an engine that hangs).
"""

import _signal
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.interrupts import HeldInterrupts

pytestmark = pytest.mark.m1

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7]


class OwnError(Exception):
    pass


@pytest.fixture(autouse=True)
def the_handler_is_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Callable[[str], Path]) -> LLM:
    return LLM(str(tiny_model_dir("llama")), dtype="float32", max_model_len=64, max_num_seqs=8)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert not shared.llm_engine.has_unfinished_requests() and not shared._waited_for
    assert shared.stats().kv_cache_usage == 0.0


def press_in_step(llm: LLM, monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1) -> list[str]:
    """Ctrl-C comes in the middle of step `number`. The list tells how that step went on."""
    executor, log = llm.llm_engine.engine_core.executor, []
    working = executor.execute
    steps = iter(range(1000))

    def execute(output: Any) -> Any:
        if next(steps) == number:
            log.append("pressed")
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            log.append("went on")
        return working(output)

    monkeypatch.setattr(executor, "execute", execute)
    return log


# ---- the context manager


def test_it_holds_the_signal_and_delivers_it_at_the_end() -> None:
    log: list[Any] = []
    own = lambda number, frame: log.append((number, frame))  # noqa: E731
    signal.signal(signal.SIGINT, own)
    with HeldInterrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.count == 1 and not log
    assert [number for number, _ in log] == [signal.SIGINT] and isinstance(log[0][1], FrameType)
    assert signal.getsignal(signal.SIGINT) is own


def test_the_default_handler_raises_at_the_end() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = False
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_is_delivered_at_once_unless_all_are_held() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    went_on = False
    with pytest.raises(KeyboardInterrupt), HeldInterrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        went_on = True
    assert not went_on
    with pytest.raises(KeyboardInterrupt), HeldInterrupts(patience=None):
        for _ in range(5):
            signal.raise_signal(signal.SIGINT)
        went_on = True
    assert went_on


def test_each_signal_reaches_the_handler_also_through_nested_blocks() -> None:
    log: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: log.append(number))
    with HeldInterrupts(patience=None) as outer:
        with HeldInterrupts(patience=None):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert outer.count == 2 and not log
        outer.deliver()
        assert len(log) == 2 and outer.count == 0
        signal.raise_signal(signal.SIGINT)
    assert len(log) == 3


def test_what_was_dealt_with_is_not_delivered() -> None:
    log: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: log.append(number))
    with HeldInterrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        interrupts.clear()
    assert not log


def test_an_exception_of_the_body_restores_the_handler_and_the_signal_is_not_lost() -> None:
    log: list[int] = []
    own = lambda number, _: log.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, own)
    with pytest.raises(OwnError), HeldInterrupts():
        signal.raise_signal(signal.SIGINT)
        raise OwnError
    assert log == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is own


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_without_a_python_handler_nothing_changes(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    with HeldInterrupts() as interrupts:
        assert signal.getsignal(signal.SIGINT) is handler
        if handler is signal.SIG_IGN:
            signal.raise_signal(signal.SIGINT)
    assert interrupts.count == 0 and signal.getsignal(signal.SIGINT) is handler


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`getsignal` answers None for it, and None cannot be restored."""
    installed: list[Any] = []
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *handler: installed.append(handler))
    with HeldInterrupts():
        pass
    assert not installed


def test_in_another_thread_nothing_is_held() -> None:
    before, errors = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        try:
            with HeldInterrupts():
                assert signal.getsignal(signal.SIGINT) is before
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_a_handler_left_behind_passes_signals_on() -> None:
    """Another signal's handler raised before `__exit__` could restore the caller's."""
    log: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: log.append(number))
    interrupts = HeldInterrupts()
    interrupts.__enter__()
    del interrupts  # its frame is gone
    signal.raise_signal(signal.SIGINT)
    assert log == [signal.SIGINT]


def test_an_exception_while_the_handler_is_installed_restores_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    calls = iter(range(10))

    def install(number: int, handler: Any) -> Any:
        result = _signal.signal(number, handler)
        if next(calls) == 0:
            raise OwnError
        return result

    monkeypatch.setattr(signal, "signal", install)
    with pytest.raises(OwnError), HeldInterrupts():
        raise AssertionError("the body must not run")
    assert signal.getsignal(signal.SIGINT) is before


# ---- generate and stream


def test_generate_is_interrupted_when_the_step_is_over(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [output.outputs[0].token_ids for output in llm.generate([PROMPT], GREEDY, use_tqdm=False)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        log = press_in_step(llm, patch, number=2)
        steps = llm.stats().num_steps
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT], GREEDY, use_tqdm=False)
        assert log == ["pressed", "went on"] and llm.stats().num_steps == steps + 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [output.outputs[0].token_ids for output in llm.generate([PROMPT], GREEDY, use_tqdm=False)] == expected


def test_a_second_ctrl_c_interrupts_the_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = press_in_step(llm, monkeypatch, number=2, times=2)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT], GREEDY, use_tqdm=False)
    assert log == ["pressed"]


def test_a_handler_that_does_not_raise_is_called_and_generate_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    own = lambda number, _: calls.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, own)
    press_in_step(llm, monkeypatch, number=2)
    (output,) = llm.generate([PROMPT], GREEDY, use_tqdm=False)
    assert calls == [signal.SIGINT] and len(output.outputs[0].token_ids) == 8
    assert signal.getsignal(signal.SIGINT) is own


def test_a_handler_may_raise_what_it_likes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OwnError("enough")

    def own(number: int, frame: FrameType | None) -> None:
        raise error

    signal.signal(signal.SIGINT, own)
    press_in_step(llm, monkeypatch, number=1)
    with pytest.raises(OwnError) as caught:
        llm.generate([PROMPT], GREEDY, use_tqdm=False)
    assert caught.value is error and signal.getsignal(signal.SIGINT) is own


def test_an_ignored_signal_changes_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    press_in_step(llm, monkeypatch, number=1)
    (output,) = llm.generate([PROMPT], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_stream_is_interrupted_when_the_step_is_over(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = press_in_step(llm, monkeypatch, number=2)
    stream = llm.stream(PROMPT, GREEDY)
    next(stream), next(stream)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "between two outputs it is the caller's"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert log == ["pressed", "went on"]


def test_an_interrupted_generate_leaves_an_open_stream_whole(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    expected = [t for output in llm.stream(PROMPT, GREEDY) for t in output.outputs[0].token_ids]
    for times in (1, 2):
        stream = llm.stream(PROMPT, GREEDY)
        tokens = list(next(stream).outputs[0].token_ids)
        with monkeypatch.context() as patch:
            press_in_step(llm, patch, number=1, times=times)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[9, 8], PROMPT], GREEDY, use_tqdm=False)
        assert tokens + [t for output in stream for t in output.outputs[0].token_ids] == expected


@pytest.mark.parametrize("method", ["withdraw", "abort_request"])
def test_an_exception_while_requests_are_released_leaves_none(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    working, calls = getattr(llm.llm_engine, method), []

    def fails_once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise OwnError
        working(*args)

    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    monkeypatch.setattr(llm.llm_engine, method, fails_once)
    with pytest.raises(OwnError):
        stream.close()
    assert not llm._abandoned and not llm.llm_engine.has_unfinished_requests()


def test_an_exception_at_any_call_leaves_the_lock_free_also_while_its_traceback_lives(llm: LLM) -> None:
    """A lock taken by a half-entered context manager would stay with the traceback, e.g. in sys.last_value."""
    params, kept = GREEDY.replace(max_tokens=1), []
    expected = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids
    for number in range(10_000):
        events = itertools.count()

        def raise_at(frame: FrameType, event: str, _: Any, events: Iterator[int] = events, number: int = number) -> Any:
            if not frame.f_code.co_filename.endswith(("entrypoints/llm.py", "contextlib.py")):
                return None
            frame.f_trace_lines = False  # signals come where functions begin and end
            if event != "exception" and next(events) == number:
                sys.settrace(None)
                raise OwnError
            return raise_at

        before = sys.gettrace()
        try:
            sys.settrace(raise_at)  # type: ignore[arg-type]
            llm.reset_prefix_cache()
            sys.settrace(before)
            break
        except OwnError as error:
            kept.append(error)
        finally:
            sys.settrace(before)
        assert not llm._lock.locked()
        assert llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert 5 < len(kept) < 9_999


def test_the_callers_handler_is_back_if_the_end_of_the_block_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    before, working, calls = signal.getsignal(signal.SIGINT), signal.signal, []
    with pytest.raises(OwnError), HeldInterrupts():

        def interrupted(*args: Any) -> Any:  # signal.signal runs the handlers of pending signals first
            calls.append(args)
            if len(calls) == 1:
                raise OwnError
            return working(*args)

        monkeypatch.setattr(signal, "signal", interrupted)
    assert len(calls) == 2 and signal.getsignal(signal.SIGINT) is before


def test_the_callers_handler_is_back_if_the_block_was_never_left() -> None:
    before = signal.getsignal(signal.SIGINT)
    held = HeldInterrupts()
    held.__enter__()
    assert signal.getsignal(signal.SIGINT) is not before
    del held
    assert signal.getsignal(signal.SIGINT) is before
