"""Engines on EchoWorker processes, and what must be left of them: nothing."""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.executor.multiproc import MultiprocExecutor
from folovllm.learn.toy_engine import make_config, make_request
from folovllm.parallel import ParallelConfig
from folovllm.request import Request
from tests.m9.echo_worker import FACTORY, VOCAB_SIZE

TIMEOUT = 60.0  # no test waits for it unless it fails
DEATH_SECONDS = 5.0  # the longest that the death of a rank may take to end the engine


def echo_config(tp: int = 2, pp: int = 1, **args: Any) -> EngineConfig:
    """A resolved config with small blocks; the fake model needs no heads that divide."""
    defaults: dict[str, Any] = {"max_model_len": 256, "num_kv_blocks": 129, "vocab_size": VOCAB_SIZE}
    return dataclasses.replace(make_config(**defaults | args), parallel_config=ParallelConfig(tp, pp))


def echo_executor(config: EngineConfig, path: Path = Path("unused")) -> MultiprocExecutor:
    return MultiprocExecutor(config, path, FACTORY)


def echo_of_two_ranks(config: EngineConfig) -> MultiprocExecutor:
    """A factory for AsyncLLM: a function of a module, so that a spawned process can import it."""
    return echo_executor(dataclasses.replace(config, parallel_config=ParallelConfig(2)))


@contextlib.contextmanager
def echo_core(path: Path = Path("unused"), **args: Any) -> Iterator[EngineCore]:
    """An engine core on echo processes. At the end none of them is left."""
    with nothing_left_behind():
        config = echo_config(**args)
        executor = echo_executor(config, path)
        try:
            yield EngineCore(config, executor)
        finally:
            executor.shutdown()
            assert not any(map(is_alive, executor.process_ids))


def process_ids(core: EngineCore) -> list[int]:
    assert isinstance(core.executor, MultiprocExecutor)
    return core.executor.process_ids


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[Path]:
    """The temporary folder of the block, in which nothing must be left; nor open descriptors, nor in /dev/shm."""
    before, shared = descriptors(), set(os.listdir("/dev/shm"))
    previous = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = previous
        assert os.listdir(folder) == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if "folovllm" in name]
    assert descriptors() <= before


def descriptors() -> set[str]:
    """The open descriptors of this process."""
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that is dead and not waited for counts as dead."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def children_of(pid: int) -> list[int]:
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]


def descendants_of(pid: int) -> list[int]:
    return [p for child in children_of(pid) for p in (child, *descendants_of(child))]


def ranks_of(pid: int) -> list[int]:
    """The processes of ranks that a process, or one of its children, has started."""
    found = descendants_of(pid)
    return [p for p in found if b"folovllm.worker.worker_process" in Path(f"/proc/{p}/cmdline").read_bytes()]


def wait_until(condition: Callable[[], Any], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def request(request_id: str, max_tokens: int = 6) -> Request:
    return make_request(request_id, prompt_of(request_id), max_tokens)


def prompt_of(request_id: str) -> list[int]:
    """Different prompts for different ids."""
    return [(7 * ord(c) + i) % VOCAB_SIZE for i, c in enumerate(request_id * 3)]


def oracle(request_id: str, max_tokens: int = 6) -> list[int]:
    """What the echo model generates."""
    return fake_tokens(prompt_of(request_id), max_tokens, VOCAB_SIZE)


def run(core: EngineCore, *requests: Request) -> dict[str, list[int]]:
    """Adds the requests and steps until all have ended. Returns the tokens of each."""
    for one in requests:
        core.add_request(one)
    while core.has_unfinished_requests():
        core.step()
    return {one.request_id: list(one.output_token_ids) for one in requests}
