"""The engine in a process of its own: what the pipe carries, signals, deaths, and a front end without torch."""

import asyncio
import atexit
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM, EngineDeadError
from folovllm.engine.core_client import ProcessCoreClient
from folovllm.engine.messages import StepOutputs, UpMessage
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import ModelRunnerOutput
from folovllm.sampling_params import SamplingParams
from folovllm.utils import cause_of_death
from tests.m8.serving_helpers import (
    VOCAB_SIZE,
    assert_all_free,
    collect,
    eventually,
    greedy,
    make_async_llm,
    oracle,
    prompt_ids,
    run_async,
)

pytestmark = pytest.mark.m8
ROOT = Path(__file__).parents[2]


class FileGatedExecutor(FakeExecutor):
    """Each step waits while the file is there: a gate that another process can open."""

    def __init__(self, gate: Path) -> None:
        super().__init__(VOCAB_SIZE)
        self._gate = gate

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        while self._gate.exists():
            time.sleep(0.005)
        return super().sample(handle)


def file_gated(gate: Path, config: EngineConfig) -> FileGatedExecutor:
    return FileGatedExecutor(gate)


def refused(config: EngineConfig) -> FakeExecutor:
    raise ValueError("block_size is odd: use an even one")


def crashing(config: EngineConfig) -> FakeExecutor:
    os._exit(7)


def touching_at_exit(path: Path, config: EngineConfig) -> FakeExecutor:
    """In the engine's process: `path` is touched when the interpreter is taken down."""
    atexit.register(path.touch)
    return FakeExecutor(VOCAB_SIZE)


def client_of(engine: AsyncLLM) -> ProcessCoreClient:
    assert isinstance(engine._client, ProcessCoreClient)
    return engine._client


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that is dead and not waited for counts as dead."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_process_does_what_a_thread_does():
    """Answers, aborts, calls and n > 1. Ctrl-C and a service manager's SIGTERM reach the engine, and it goes on."""

    async def test() -> None:
        async with make_async_llm(in_process=True) as engine:
            pid = client_of(engine).pid
            assert pid is not None and pid != os.getpid()
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(20)) for i in range(8)]
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
            assert await asyncio.gather(*map(collect, streams)) == [oracle(prompt_ids(i), 20) for i in range(8)]

            stream = await engine.add_request("gone", prompt_ids(1), greedy(200))
            await anext(stream)
            await stream.aclose()
            params = SamplingParams(n=2, temperature=1.0, max_tokens=6, ignore_eos=True)
            last = [o async for o in await engine.add_request("two", prompt_ids(2), params)][-1]
            assert last.finished
            await assert_all_free(engine)
            assert await engine.reset_prefix_cache() is True
        assert not is_alive(pid) and not engine.is_dead

    run_async(test)


def test_neither_a_long_step_nor_a_stalled_event_loop_blocks_the_other_side(tmp_path):
    """The gate holds a step while more than a pipe takes is sent; then the event loop sleeps while it is answered."""

    async def test() -> None:
        gate = tmp_path / "gate"
        gate.touch()
        factory = functools.partial(file_gated, gate)
        args = {"max_model_len": 16384, "num_kv_blocks": 8000, "max_num_batched_tokens": 100_000}
        async with make_async_llm(factory, in_process=True, **args) as engine:
            client = client_of(engine)
            all_sent, deliver = threading.Event(), client._deliver

            def watching_deliver(message: UpMessage) -> None:
                deliver(message)
                if isinstance(message, StepOutputs) and message.stats.num_generation_tokens == 300 + 8:
                    all_sent.set()

            client._deliver = watching_deliver  # type: ignore[method-assign]
            first = await engine.add_request("r", prompt_ids(1), greedy(300))
            long = [await engine.add_request(f"long{i}", prompt_ids(i, 16000), greedy(1)) for i in range(8)]
            gate.unlink()
            assert all_sent.wait(30)  # blocks the event loop: the 300 answers are more than a pipe takes
            assert engine.stats.num_steps == 0
            assert await collect(first) == oracle(prompt_ids(1), 300)
            assert [await collect(s) for s in long] == [oracle(prompt_ids(i, 16000), 1) for i in range(8)]

    run_async(test)


def test_a_killed_engine_ends_every_stream_with_the_cause(tmp_path, caplog):
    caplog.set_level("CRITICAL", "folovllm")

    async def test() -> None:
        async with make_async_llm(functools.partial(file_gated, tmp_path / "gate"), in_process=True) as engine:
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(200)) for i in range(3)]
            await anext(streams[0])
            (tmp_path / "gate").touch()
            os.kill(client_of(engine).pid or 0, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(EngineDeadError, match="the engine process was killed by SIGKILL"):
                    await collect(stream)
            assert engine.is_dead and engine.num_unfinished == 0
            with pytest.raises(EngineDeadError):
                await engine.add_request("new", [1], greedy())

    run_async(test)


@pytest.mark.parametrize(
    ("factory", "expected", "match"),
    [
        (refused, ValueError, "^block_size is odd: use an even one$"),
        (crashing, EngineDeadError, "the engine process ended with exit status 7"),
    ],
)
def test_a_start_that_fails_says_why(factory, expected, match):
    async def test() -> None:
        with pytest.raises(expected, match=match):
            async with make_async_llm(factory, in_process=True):
                pass

    run_async(test)


def test_causes_of_death():
    assert cause_of_death(3) == "the engine process ended with exit status 3"
    assert cause_of_death(-signal.SIGSEGV) == "the engine process was killed by SIGSEGV"
    assert cause_of_death(-63).endswith("signal 63")


SCRIPT = """
import asyncio, os, sys
from tests.m8.serving_helpers import *
import folovllm.entrypoints.start

async def main():
    async with make_async_llm(in_process=True) as engine:
        assert await collect(await engine.add_request("r", prompt_ids(1), greedy(5))) == oracle(prompt_ids(1), 5)
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        print(engine._client.pid, flush=True)
        if sys.argv[1] == "wait":
            await asyncio.sleep(60)
        if sys.argv[1] == "exit":
            raise SystemExit(3)
        if sys.argv[1] == "forget":
            engine.shutdown = lambda: asyncio.sleep(0)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("exit", 3), ("forget", 0), ("wait", -signal.SIGKILL)])
def test_the_front_end_imports_no_torch_and_takes_its_engine_along(how, status, tmp_path):
    """However the front end ends, the engine's process ends too: no process with a model is left behind."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script), how], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as front_end:
        assert front_end.stdout is not None
        pid = int(front_end.stdout.readline())
        if how == "wait":
            front_end.kill()
        assert front_end.wait(30) == status
    run_async(lambda: eventually(lambda: not is_alive(pid)))


def test_the_engines_process_ends_without_taking_its_interpreter_down(tmp_path):
    """`serve -tp 2 -pp 2` took 5 s to end after Ctrl-C, while Python took torch apart on a busy machine."""

    async def test() -> None:
        factory = functools.partial(touching_at_exit, tmp_path / "taken_down")
        async with make_async_llm(factory, in_process=True) as engine:
            await collect(await engine.add_request("r", prompt_ids(1), greedy(2)))
        assert client_of(engine)._process.exitcode == 0

    run_async(test)
    assert not (tmp_path / "taken_down").exists()


def test_one_thread_alone_waits_for_the_engines_process(caplog):
    """With two, one could miss the end, and the log said that the process "did not end within 10 s: it is killed"."""
    caplog.set_level("INFO", "folovllm")
    waiting: set[str] = set()

    async def test() -> None:
        async with make_async_llm(in_process=True) as engine:
            process = client_of(engine)._process
            join = process.join

            def watched_join(timeout: float | None = None) -> None:
                waiting.add(threading.current_thread().name)
                join(timeout)

            process.join = watched_join  # type: ignore[method-assign]

    run_async(test)
    assert waiting == {"folovllm-reader"}
    assert "it is killed" not in caplog.text


def test_a_request_class_from_a_file_crosses_the_pipe(tmp_path):
    """The part core.request: its class must be loaded in the engine's process before one arrives."""
    part = tmp_path / "my_request.py"
    part.write_text("from folovllm.request import Request\n\nclass MyRequest(Request):\n    pass\n")

    async def test() -> None:
        async with make_async_llm(in_process=True, parts={"core.request": f"{part}:MyRequest"}) as engine:
            stream = await engine.add_request("r", prompt_ids(1), greedy(5))
            assert await collect(stream) == oracle(prompt_ids(1), 5)

    run_async(test)


@pytest.mark.parametrize("in_process", [False, True])
def test_an_engine_that_is_too_fast_waits_for_the_event_loop(in_process, monkeypatch):
    """Steps without a front end that handles them: at most MAX_UNDELIVERED messages are on their way to it."""
    monkeypatch.setattr("folovllm.engine.core_client.MAX_UNDELIVERED", 4)
    stalled_at = []

    async def main() -> None:
        async with make_async_llm(in_process=in_process, max_model_len=2048, num_kv_blocks=300) as engine:
            stream = await engine.add_request("a", [1, 2, 3], greedy(2000))
            await stream.__anext__()
            time.sleep(0.3)  # the event loop stalls: hundreds of fake steps' time
            stalled_at.append(len(engine._client._event_loop._ready))
            tokens = [token async for output in stream for token in output.outputs[0].token_ids]
            assert tokens == oracle([1, 2, 3], 2000)[-len(tokens) :]
            await assert_all_free(engine)

    run_async(main)
    assert stalled_at[0] <= 4 + 4  # and a few callbacks of the event loop's own
