"""EchoWorker: a rank without torch and without a model, which does what the requests of a step say.

MultiprocExecutor starts it with worker_factory="tests.m9.echo_worker:make_echo". The next token of a request is a
function of its last one, as the fake model's. A request whose id begins with one of these words does more:

    raise            every rank raises ValueError
    raise-I          rank I alone raises, and the others wait for it as they would in an all-reduce
    late-I           rank I alone raises, after the others have had what they need of it
    exit-I, kill-I   rank I ends with status 3, or kills itself
    wait             every rank waits while the file that the model's path names is there
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.fake import FakeExecutor
from folovllm.executor.rank_messages import Calls, StartRank
from folovllm.outputs import ModelRunnerOutput

VOCAB_SIZE = 400
FACTORY = "tests.m9.echo_worker:make_echo"


class EchoWorker(FakeExecutor):
    """One rank. All of them keep the whole state of the fake model, and so each could answer."""

    def __init__(self, start: StartRank) -> None:
        super().__init__(VOCAB_SIZE, available_bytes=2**30 + start.rank)
        self.rank, self.path, self.num_calls = start.rank, start.model_path, 0
        (start.folder / f"rank-{start.rank}").write_text("here")

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        if kv_cache_config.num_blocks == 13 and self.rank == 1:
            raise ValueError("13 blocks do not fit: lower num_kv_blocks")
        super().initialize_kv_cache(kv_cache_config)

    def step(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in scheduler_output.num_scheduled_tokens:
            word, _, rank = request_id.partition("-")
            self._obey(word, rank[:1])
        self.num_calls += 1
        return self.sample(self.execute(scheduler_output))

    def _obey(self, word: str, rank: str) -> None:
        is_meant = rank in ("", str(self.rank))
        if word == "wait":
            while self.path.exists():
                time.sleep(0.005)
        elif word == "raise" and is_meant:
            raise ValueError("this request cannot be computed")
        elif word == "raise":
            time.sleep(3600)  # an all-reduce in which one rank is missing
        elif word == "late" and is_meant:
            time.sleep(0.2)
            self.num_calls += 1
            raise RuntimeError("too late for the others")
        elif word == "exit" and is_meant:
            print("this rank has had enough", flush=True)
            os._exit(3)
        elif word == "kill" and is_meant:
            os.kill(os.getpid(), signal.SIGKILL)

    def skip(self, scheduler_output: SchedulerOutput) -> None:
        pass

    def catch_up(self, calls: list[Calls]) -> Calls:
        return self.calls()

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank, "process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}

    def calls(self) -> Calls:
        return {"tp": {"all_reduce": self.num_calls}, "pp": {}}


def make_echo(start: StartRank) -> EchoWorker:
    return EchoWorker(start)


def make_refusing(start: StartRank) -> EchoWorker:
    """Rank 1 refuses the config."""
    if start.rank == 1:
        raise ValueError("tensor_parallel_size=2 does not suit this model: use 1")
    time.sleep(3600)
    raise AssertionError


def make_dying(start: StartRank) -> EchoWorker:
    """Rank 1 dies while it starts."""
    if start.rank == 1:
        print("the last words of rank 1", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
    raise AssertionError


class Odd(Exception):
    """An exception that cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} is odd, and so is {two}")


def make_odd(start: StartRank) -> EchoWorker:
    raise Odd(1, 3)


def write_pids(folder: Path, start: StartRank) -> None:
    (folder / str(start.rank)).write_text(str(os.getpid()))


def make_slow_start(start: StartRank) -> EchoWorker:
    """Says its process id in the folder that the model's path names, and never becomes ready."""
    write_pids(start.model_path, start)
    time.sleep(3600)
    raise AssertionError
