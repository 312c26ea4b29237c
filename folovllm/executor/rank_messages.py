"""The messages between MultiprocExecutor and the processes of its ranks: plain data that can be pickled.

Milestone: M9. vLLM counterpart: the tuples that `collective_rpc` sends in vllm/v1/executor/multiproc_executor.py.

    down, through the shared-memory ring, one message for all ranks:   Step, Ask
    up, through the socket of each rank:                               Done, Failed

A `Step` is answered by one rank, or by each rank in which it raises. An `Ask` is answered by every rank.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.shm_ring import RingEnd


@dataclass(frozen=True)
class StartRank:
    """The first message, through the socket: everything that a rank has to know."""

    rank: int
    config: EngineConfig
    model_path: Path
    folder: Path  # for the rendezvous
    ring: RingEnd
    threads: int  # that compute on a CPU
    log_level: int
    parent_id: int  # the process that started the rank
    worker_factory: str  # "module:function"


@dataclass(frozen=True, slots=True)
class Step:
    """Execute and sample."""

    number: int
    scheduler_output: SchedulerOutput


@dataclass(frozen=True, slots=True)
class Ask:
    """A call of one of the worker's other methods, by name."""

    number: int
    name: str
    args: tuple[Any, ...] = ()


DownMessage = Step | Ask


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to message `number`. The first one, with number 0, says that the rank is ready."""

    number: int
    value: Any = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Message `number` raised `error`, whose notes hold the traceback of the rank."""

    number: int
    error: Exception


Answer = Done | Failed
Calls = dict[str, dict[str, int]]  # group ("tp", "pp") -> operation -> how often a rank has called it
