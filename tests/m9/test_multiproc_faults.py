"""Deaths and errors of ranks and of their parent, with echo processes.

Each test ends in `nothing_left_behind`: no process, no descriptor, nothing in the temporary folder or in /dev/shm.
"""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from folovllm.engine.async_llm import EngineDeadError, RequestFailedError
from folovllm.executor import multiproc, ranks
from folovllm.executor.base import ExecutorDeadError
from folovllm.executor.multiproc import MultiprocExecutor
from tests.m8 import serving_helpers
from tests.m8.serving_helpers import collect, greedy
from tests.m9.multiproc_helpers import (
    DEATH_SECONDS,
    TIMEOUT,
    echo_config,
    echo_core,
    echo_of_two_ranks,
    is_alive,
    nothing_left_behind,
    oracle,
    process_ids,
    ranks_of,
    request,
    run,
    wait_until,
)

pytestmark = pytest.mark.m9
ECHO = "tests.m9.echo_worker"
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def dies_within(seconds: float, match: str) -> Iterator[None]:
    began = time.monotonic()
    with pytest.raises(ExecutorDeadError, match=match):
        yield
    assert time.monotonic() - began < seconds


# ---- a rank dies


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_is_killed_while_idle_ends_the_others_with_its_cause(rank):
    with echo_core(tp=2, pp=2) as core:
        assert run(core, request("before")) == {"before": oracle("before")}
        ids = process_ids(core)
        os.kill(ids[rank], signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, ids)), DEATH_SECONDS)  # though nothing calls the executor
        cause = rf"^rank {rank} \(process {ids[rank]}\) was killed by SIGKILL; if the machine ran out of memory"
        for call in (core.executor.check_health, core.executor.describe, lambda: run(core, request("after"))):
            with dies_within(1.0, cause):
                call()


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("word", ["kill", "exit"])
def test_a_rank_that_dies_in_a_step_ends_the_engine_and_is_named_with_its_last_words(word, rank):
    """The other rank is in the same step, and would wait for it."""
    how = (
        "was killed by SIGKILL"
        if word == "kill"
        else "ended with exit status 3; the last line that it printed: this rank"
    )
    with echo_core() as core, dies_within(DEATH_SECONDS, rf"^rank {rank} \(process \d+\) {how}"):
        run(core, request("other", 50), request(f"{word}-{rank}", 1))


def test_a_rank_that_dies_while_it_starts_is_named_with_its_last_words():
    with (
        nothing_left_behind(),
        pytest.raises(ExecutorDeadError, match=r"rank 1 .* killed by SIGKILL.* last words of rank 1"),
    ):
        MultiprocExecutor(echo_config(), Path("unused"), f"{ECHO}:make_dying")


def test_a_rank_that_refuses_the_config_raises_what_it_raised():
    """The other one waits for it in the rendezvous."""
    with nothing_left_behind(), pytest.raises(ValueError, match="does not suit this model: use 1"):
        MultiprocExecutor(echo_config(), Path("unused"), f"{ECHO}:make_refusing")


def test_an_error_that_cannot_be_unpickled_arrives_as_text():
    with nothing_left_behind(), pytest.raises(RuntimeError, match=r"^Odd: 1 is odd, and so is 3") as caught:
        MultiprocExecutor(echo_config(), Path("unused"), f"{ECHO}:make_odd")
    assert "Odd" in caught.value.__notes__[0] and "make_odd" in caught.value.__notes__[0]


# ---- a step raises


def test_a_request_that_raises_in_every_rank_fails_alone():
    with echo_core() as core:
        others = [request("r1", 20), request("r2", 20)]
        for one in [*others, request("raise")]:
            core.add_request(one)
        with pytest.raises(ValueError, match="this request cannot be computed") as caught:
            core.step(blamed=["raise"])
        assert "in rank" in caught.value.__notes__[0]
        while core.has_unfinished_requests():
            core.step()
        assert [one.output_token_ids for one in others] == [oracle("r1", 20), oracle("r2", 20)]
        assert run(core, request("new")) == {"new": oracle("new")}


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_that_raises_alone_ends_the_engine(rank, monkeypatch):
    """The other one waits in the middle of the step, for good."""
    monkeypatch.setattr(ranks, "SYNC_SECONDS", 0.5)
    cause = (
        f"rank {rank} is not in step with the others any more: it raised ValueError: this request cannot be computed"
    )
    with echo_core() as core, dies_within(DEATH_SECONDS, cause):
        run(core, request(f"raise-{rank}"))


def test_a_rank_that_raises_after_the_last_call_of_a_step_fails_the_step():
    """All ranks are at the end of the step, so the next one can be computed."""
    with echo_core() as core:
        core.add_request(request("late-0"))
        with pytest.raises(RuntimeError, match="too late for the others"):
            core.step()
        assert run(core, request("new")) == {"new": oracle("new")}


def test_in_a_server_a_request_that_raises_in_every_rank_fails_alone(caplog):
    """The engine is a process whose children are the ranks. A rank's death is told to all streams, and ends it."""
    caplog.set_level("CRITICAL", "folovllm")

    async def test() -> None:
        async with serving_helpers.make_async_llm(echo_of_two_ranks, in_process=True) as engine:
            ids = ranks_of(os.getpid())
            streams = [await engine.add_request(f"r{i}", serving_helpers.prompt_ids(i), greedy(9)) for i in range(4)]
            bad = await engine.add_request("raise", [5, 6], greedy(9))
            answers = await asyncio.gather(*map(collect, streams))
            assert answers == [serving_helpers.oracle(serving_helpers.prompt_ids(i), 9) for i in range(4)]
            with pytest.raises(RequestFailedError, match="'raise' failed inside the engine"):
                await collect(bad)
            fatal = await engine.add_request("kill-1", [5, 6], greedy(9))
            with pytest.raises(EngineDeadError, match=r"rank 1 .* was killed by SIGKILL"):
                await collect(fatal)
            assert len(ids) == 2
            wait_until(lambda: not any(map(is_alive, ids)), DEATH_SECONDS)

    serving_helpers.run_async(test)


def test_a_rank_that_goes_on_alone_is_noticed():
    """Rank 0 has answered before rank 1 raises. What they keep differs, so no step must use it any more."""
    with echo_core() as core:
        core.add_request(request("late-1", 50))
        core.step()
        time.sleep(1.0)  # in the real model rank 0 could not end the next step without rank 1
        with dies_within(
            DEATH_SECONDS, "rank 1 is not in step with the others any more: it raised RuntimeError: too late"
        ):
            core.step()
        assert not core.scheduler.requests


def test_a_step_without_an_end_ends_the_engine(monkeypatch):
    monkeypatch.setattr(multiproc, "STEP_SECONDS", 0.5)
    with echo_core() as core:
        os.kill(process_ids(core)[0], signal.SIGSTOP)
        with dies_within(DEATH_SECONDS, "a step has not ended in 0.5 s"):
            run(core, request("r"))


def test_ranks_that_take_no_message_end_the_engine(monkeypatch):
    monkeypatch.setattr(multiproc, "STEP_SECONDS", 0.5)
    with echo_core(
        tp=1, max_model_len=700_000, num_kv_blocks=300, block_size=4096, max_num_batched_tokens=10**6
    ) as core:
        long = request("r")
        long = type(long)("long", [1] * 600_000, long.sampling_params)
        os.kill(process_ids(core)[0], signal.SIGSTOP)
        with dies_within(DEATH_SECONDS, "the ranks have taken no message for 0.5 s: .* reader 0"):
            run(core, long)


# ---- the end


def test_the_engine_is_shut_down_in_the_middle_of_a_step(tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    with echo_core(gate) as core:
        raised: list[BaseException] = []

        def step() -> None:
            try:
                run(core, request("wait"))
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=step, daemon=True)
        thread.start()
        wait_until(lambda: core.scheduler.running)
        time.sleep(0.1)
        core.executor.shutdown()
        thread.join(DEATH_SECONDS)
        assert [str(error) for error in raised] == ["the engine has been shut down"]
        core.executor.shutdown()  # twice does no harm


PARENT = """
import sys, time
from pathlib import Path
from folovllm.engine.async_llm import EngineDeadError, RequestFailedError
from folovllm.engine.core import EngineCore
from folovllm.executor.multiproc import MultiprocExecutor
from tests.m9.multiproc_helpers import *

config = echo_config()
executor = MultiprocExecutor(config, Path(sys.argv[1]), sys.argv[2])
core = EngineCore(config, executor)
print(*executor.process_ids, flush=True)
try:
    run(core, *[request(name, 20) for name in sys.argv[3:]])
except KeyboardInterrupt:
    print("interrupted", flush=True)
    Path(sys.argv[1]).unlink()
    print(run(core, request("new")) == {"new": oracle("new")}, flush=True)
    sys.exit()
time.sleep(3600)
"""


@contextlib.contextmanager
def parent(path: Path, factory: str, *requests: str) -> Iterator[subprocess.Popen[str]]:
    """A process with an engine of its own, in a process group of its own."""
    with nothing_left_behind() as folder:
        command = [sys.executable, "-c", PARENT, str(path), f"{ECHO}:{factory}", *requests]
        environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate(timeout=TIMEOUT)
            wait_until(lambda: os.listdir(folder) == [], DEATH_SECONDS)


@pytest.mark.parametrize("word", ["nothing", "wait"])
def test_ranks_end_when_their_parent_is_killed(word, tmp_path):
    """While they are idle, and in the middle of a step."""
    gate = tmp_path / "gate"
    gate.touch()
    with parent(gate, "make_echo", *([word] if word == "wait" else [])) as process:
        assert process.stdout is not None
        ids = [int(word) for word in process.stdout.readline().split()]
        assert len(ids) == 2 and all(map(is_alive, ids))
        time.sleep(0.1)
        process.kill()
        wait_until(lambda: not any(map(is_alive, ids)), DEATH_SECONDS)


def test_ranks_end_when_their_parent_is_killed_while_they_start(tmp_path):
    with parent(tmp_path, "make_slow_start") as process:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        ids = [int(path.read_text() or 0) for path in tmp_path.iterdir()]
        process.kill()
        wait_until(lambda: not any(map(is_alive, ids)), DEATH_SECONDS)


def test_ctrl_c_in_the_terminal_reaches_the_engine_alone(tmp_path):
    """The terminal sends it to all processes of the group. The step ends, the request fails, and the engine goes on."""
    gate = tmp_path / "gate"
    gate.touch()
    with parent(gate, "make_echo", "wait") as process:
        assert process.stdout is not None
        ids = [int(word) for word in process.stdout.readline().split()]
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        for pid in ids:
            os.kill(pid, signal.SIGINT)  # as a program does that signals all of its children
            os.kill(pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=TIMEOUT)
        assert out.split() == ["interrupted", "True"] and process.returncode == 0
        assert not any(map(is_alive, ids))


def test_a_full_disk_fails_the_start_and_leaves_nothing(monkeypatch):
    with nothing_left_behind():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError, match=r"no room for 1.0 MiB of shared memory"):
                MultiprocExecutor(echo_config(), Path("unused"), f"{ECHO}:make_echo")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_engine_starts_in_a_process_without_stdin():
    """A shell's "<&-" closes it. The ring must not get its number, which a rank gives to its own stdin."""
    code = f"""
from pathlib import Path
from folovllm.executor.multiproc import MultiprocExecutor
from tests.m9.multiproc_helpers import echo_config
executor = MultiprocExecutor(echo_config(), Path("unused"), "{ECHO}:make_echo")
print(executor.available_kv_cache_bytes())
executor.shutdown()
"""
    command = ["sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2**30


def test_an_engine_that_cannot_be_built_ends_its_ranks(monkeypatch, tiny_model_dir):
    """LLM and the server's engine make the executor first. What fails after it must not leave its processes."""

    from folovllm.engine import start_core
    from folovllm.entrypoints import llm
    from folovllm.executor import select

    made: list[MultiprocExecutor] = []

    def make(config, path):
        made.append(MultiprocExecutor(config, path, f"{ECHO}:make_echo"))
        return made[-1]

    monkeypatch.setattr(select, "make_executor", make)
    monkeypatch.setattr(llm, "make_executor", make)
    args = {"model": str(tiny_model_dir("llama_rope")), "num_kv_blocks": 2, "max_model_len": 100}
    args |= {"tensor_parallel_size": 2}
    with nothing_left_behind():
        with pytest.raises(ValueError, match="the KV cache is too small"):
            llm.LLM(**args)
        config = llm.EngineConfig.from_args(**args)
        with pytest.raises(ValueError, match="the KV cache is too small"):
            start_core.build_core(config, Path(args["model"]))
        assert len(made) == 2
        assert not any(is_alive(pid) for executor in made for pid in executor.process_ids)
