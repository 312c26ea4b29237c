"""The engine and its process: garbage collection, threads, torch's settings, fork. Neither disturbs the other.

Public reports: vLLM pull 48675 and issue 21073 (objects stay frozen), vLLM issue 1285 and exllamav2 issue 690 (several
threads hang or get KeyErrors).
"""

import asyncio
import gc
import multiprocessing
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.outputs import RequestOutput
from folovllm.trace.lint import lint
from folovllm.trace.record import read_trace

pytestmark = pytest.mark.m1

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS = [[3 + i * j % 250 for j in range(1, 12 + i)] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


def make_llm(folder: Path, **args: Any) -> LLM:
    return LLM(str(folder), **({"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8} | args))


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return make_llm(folder)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert not shared.llm_engine.has_unfinished_requests() and not shared._waited_for and not shared._mail
    assert shared.stats().kv_cache_usage == 0.0


def generate(llm: LLM, prompts: Any, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def tokens_of(stream: Iterator[RequestOutput]) -> list[int]:
    return [token for output in stream for token in output.outputs[0].token_ids]


# ---- garbage collection


class Node:
    def __init__(self) -> None:
        self.me = self  # only the collector frees it


@contextmanager
def unfrozen() -> Iterator[None]:
    """Nothing is frozen inside. Afterwards everything is, as tests/conftest.py leaves it for the tests that follow."""
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.freeze()


def test_nothing_is_frozen_and_garbage_is_collected_while_the_engine_is_busy(folder: Path) -> None:
    with unfrozen():
        llm = make_llm(folder)
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        node = Node()
        alive = weakref.ref(node)
        del node
        next(stream)
        gc.collect()
        assert alive() is None and gc.get_freeze_count() == 0
        del stream, llm
        assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen(folder: Path) -> None:
    with unfrozen():
        gc.freeze()
        count = gc.get_freeze_count()
        llm = make_llm(folder)
        generate(llm, PROMPTS)
        next(llm.stream(PROMPTS[0], GREEDY))
        # Frozen objects that are freed by their reference counts leave; a `gc.unfreeze` would leave none.
        assert count * 0.9 < gc.get_freeze_count() <= count
        gc.freeze()
        count = gc.get_freeze_count()
        generate(llm, PROMPTS)
        del llm
        assert gc.get_freeze_count() > count * 0.9


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_stays_as_the_caller_wants_it(llm: LLM, enabled: bool) -> None:
    before, thresholds = gc.isenabled(), gc.get_threshold()
    try:
        (gc.enable if enabled else gc.disable)()
        generate(llm, PROMPTS)
        assert gc.isenabled() is enabled and gc.get_threshold() == thresholds
    finally:
        (gc.enable if before else gc.disable)()


def test_an_engine_is_gone_when_its_last_name_is(folder: Path) -> None:
    llm = make_llm(folder)
    generate(llm, PROMPTS)
    next(llm.stream(PROMPTS[0], GREEDY))
    parts = [weakref.ref(part) for part in (llm, llm.llm_engine, llm.llm_engine.engine_core.executor.worker)]
    del llm
    gc.collect()
    assert [part() for part in parts] == [None] * 3


def test_a_stream_that_the_collector_closes_in_the_middle_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(llm, PROMPTS)
    holder = {"stream": llm.stream(PROMPTS[0], GREEDY.replace(max_tokens=40))}
    next(holder["stream"])
    schedule = llm.llm_engine.engine_core.scheduler.schedule_waiting

    def collect_first(step: Any) -> None:
        holder.clear()  # the last reference: the generator is closed here, inside `schedule`
        schedule(step)

    monkeypatch.setattr(llm.llm_engine.engine_core.scheduler, "schedule_waiting", collect_first)
    assert generate(llm, PROMPTS) == expected and not holder


# ---- threads


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """The results of `work(i)`, each from a thread of its own; what one raises is its result."""
    results: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it hangs"
    return results


def test_threads_generate_and_stream_together(llm: LLM) -> None:
    expected = generate(llm, PROMPTS)

    def work(i: int) -> list[int]:
        return generate(llm, [PROMPTS[i]])[0] if i % 2 else tokens_of(llm.stream(PROMPTS[i], GREEDY))

    for _ in range(5):
        assert in_threads(work) == expected


def test_a_stream_left_half_read_in_a_thread_blocks_no_other(llm: LLM) -> None:
    expected = generate(llm, PROMPTS)
    held: list[Any] = []

    def leave(_: int) -> None:
        held.append(llm.stream(PROMPTS[0], GREEDY))
        next(held[0])

    in_threads(leave, 1)
    assert in_threads(lambda i: generate(llm, [PROMPTS[i]])[0]) == expected
    rest = in_threads(lambda _: tokens_of(held[0]), 1)[0]
    assert len(rest) == GREEDY.max_tokens - 1 and expected[0][1:] == rest


def test_a_thread_that_fails_takes_no_other_with_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread 0 fails in every step that it makes itself; the others have their requests in those steps."""
    expected = generate(llm, PROMPTS)
    executor, failing = llm.llm_engine.engine_core.executor, []
    execute = executor.execute

    def fail(output: Any) -> Any:
        if threading.current_thread() in failing:
            raise RuntimeError("this thread fails")
        return execute(output)

    monkeypatch.setattr(executor, "execute", fail)

    def work(i: int) -> list[int]:
        if i == 0:
            failing.append(threading.current_thread())
        return generate(llm, [PROMPTS[i]])[0]

    for _ in range(5):
        failing.clear()
        first, *others = in_threads(work)
        assert others == expected[1:] and (first == expected[0] or "this thread fails" in str(first))


def test_asyncio_threads(llm: LLM) -> None:
    expected = generate(llm, PROMPTS)

    async def main() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(generate, llm, [prompt]) for prompt in PROMPTS))

    assert [result[0] for result in asyncio.run(main())] == expected


def test_a_call_from_inside_a_step_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = llm.llm_engine.engine_core.executor
    execute = executor.execute

    def call_again(output: Any) -> Any:
        with pytest.raises(RuntimeError, match="called from inside one of its own steps"):
            generate(llm, PROMPTS)
        return execute(output)

    monkeypatch.setattr(executor, "execute", call_again)
    assert len(generate(llm, PROMPTS)) == 4


def test_generate_inside_the_loop_over_a_stream(llm: LLM) -> None:
    expected = generate(llm, PROMPTS)
    tokens: list[int] = []
    for output in llm.stream(PROMPTS[0], GREEDY):
        tokens += output.outputs[0].token_ids
        assert generate(llm, PROMPTS[1:]) == expected[1:]
    assert tokens == expected[0]


def test_a_request_aborted_from_outside_does_not_hang_generate(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, execute = llm.llm_engine, llm.llm_engine.engine_core.executor.execute
    ids: list[str] = []

    def note(output: Any) -> Any:
        ids.extend(output.num_scheduled_tokens)
        return execute(output)

    monkeypatch.setattr(engine.engine_core.executor, "execute", note)
    progress = lambda bar, output, stats: engine.abort_request(ids)  # noqa: E731
    monkeypatch.setattr("folovllm.entrypoints.llm._advance", progress)
    with pytest.raises(RuntimeError, match="was aborted from outside"):
        llm.generate(PROMPTS[:2], [GREEDY.replace(max_tokens=2), GREEDY], use_tqdm=False)


# ---- torch's settings


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    assert torch.get_default_dtype() is torch.float64
    torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    assert torch.get_default_device().type == "meta"
    torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": default_dtype,
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "anomaly detection": torch.autograd.detect_anomaly,
    "threads": two_threads,
}


def seen_state() -> tuple[Any, ...]:
    """What the caller can see of torch's state, and of the random generators."""
    return (
        torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.get_default_device(),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(), torch.get_rng_state().tolist(), random.getstate(),
        np.random.get_state()[1].tolist(),
    )  # fmt: skip


@dataclass(frozen=True)
class Plain:
    """An engine that was made outside of every setting, and its answers there."""

    args: dict[str, Any]
    llm: LLM
    expected: list[list[int]]
    sampled: list[list[int]]


TWO_LOGPROBS = GREEDY.replace(logprobs=2)
DRAWN = TWO_LOGPROBS.replace(temperature=1.0, top_p=0.9, seed=3)


@pytest.fixture(scope="module", params=[{}, {"preset": "m3"}], ids=["top", "m3"])
def plain(folder: Path, request: pytest.FixtureRequest) -> Plain:
    llm = make_llm(folder, **request.param)
    return Plain(request.param, llm, generate(llm, PROMPTS, TWO_LOGPROBS), generate(llm, PROMPTS, DRAWN))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_caller_sets_in_torch_changes_nothing_and_is_not_changed(
    folder: Path, setting: str, plain: Plain
) -> None:
    with SETTINGS[setting]():
        before = seen_state()
        inside = make_llm(folder, **plain.args)
        assert seen_state() == before
        for llm in (plain.llm, inside):  # made outside, and inside
            assert generate(llm, PROMPTS, TWO_LOGPROBS) == plain.expected
            assert generate(llm, PROMPTS, DRAWN) == plain.sampled
            stream = llm.stream(PROMPTS[0], GREEDY)
            next(stream)
            assert seen_state() == before, "between two outputs of a stream"
            del stream
        inside.shutdown()
        assert seen_state() == before
    for llm in (plain.llm, inside):
        assert generate(llm, PROMPTS, TWO_LOGPROBS) == plain.expected


def test_an_exception_in_a_step_restores_the_settings(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llm.llm_engine.engine_core.executor.worker.model_runner.model

    def fail(*_: Any) -> None:
        assert torch.get_default_dtype() is torch.float32
        raise RuntimeError("boom")

    with default_dtype(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = seen_state()
        monkeypatch.setattr(model, "forward", fail)
        with pytest.raises(RuntimeError, match="boom"):
            generate(llm, PROMPTS)
        assert seen_state() == before


# ---- fork


def in_child(llm: LLM) -> str:
    try:
        generate(llm, PROMPTS)
    except RuntimeError as error:
        return str(error)
    return "it worked"


def child_main(llm: LLM, queue: Any) -> None:
    queue.put(in_child(llm))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_is_told_to_spawn(llm: LLM) -> None:
    expected = generate(llm, PROMPTS)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child_main, args=(llm, queue))
    process.start()
    message = queue.get(timeout=60)
    process.join(60)
    assert "made in another process" in message and "spawn" in message and process.exitcode == 0
    assert generate(llm, PROMPTS) == expected, "the parent goes on"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_writes_nothing_into_the_parents_trace(folder: Path, tmp_path: Path) -> None:
    """Neither when it ends in the middle of a stream, nor what lies in the file's buffer."""
    path = tmp_path / "trace.jsonl"
    llm = make_llm(folder, trace=str(path))
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if "spawn" in in_child(llm) else 2
            stream.close()
            llm.shutdown()
            llm.llm_engine.engine_core.trace.close()
        finally:
            sys.stdout.flush()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(tokens_of(stream)) == GREEDY.max_tokens - 1
    llm.shutdown()
    trace = read_trace(path)
    assert trace.end is not None and trace.end["steps"] == len(trace.steps) == GREEDY.max_tokens and not lint(trace)
