"""The messages between the front end and the engine core's loop: plain data that can be pickled.

Milestone: M8. vLLM counterpart: vllm/v1/engine/__init__.py (`EngineCoreRequestType`, `EngineCoreOutputs`,
`UtilityOutput`); there msgpack encodes them, and zmq sockets carry them.
Left out: data-parallel waves, LoRA, tensors out of band.

Row 1: no torch. The engine runs in a process or in a thread, and the messages are the same.

Each request that an `AddRequests` brings ends with exactly one EngineCoreOutput that has a `finish_reason`: from its
last step, from its abort, or from its failure. So the front end knows when an id is out of use.
"""

from dataclasses import dataclass, field
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.outputs import EngineCoreOutput, EngineStats
from folovllm.request import Request

# ---- down: from the front end to the core's loop


@dataclass(frozen=True, slots=True)
class AddRequests:
    """Requests that the front end has validated. Those with n > 1 have been fanned out."""

    requests: list[Request]


@dataclass(frozen=True, slots=True)
class AbortRequests:
    """Ids of requests that end now; unknown ones have ended already."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of one of the loop's few other functions, by name. `CallResult` answers it."""

    call_id: int
    name: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Stop:
    """The loop ends, and drops what it has."""


DownMessage = AddRequests | AbortRequests | Call | Stop

# ---- up: from the core's loop to the front end


@dataclass(frozen=True, slots=True)
class Ready:
    """The first message: the engine serves now. `config` is the resolved one."""

    config: EngineConfig
    kv_cache_config: KVCacheConfig
    description: dict[str, Any]  # what runs, see Executor.describe


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The first message if there is no engine. `is_user_error`: it was a ValueError, so its text names a fix."""

    cause: str
    is_user_error: bool


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What one step gave, or what changed between two steps.

    `records` are trace records, which the loop makes only while the front end watches.
    """

    outputs: list[EngineCoreOutput]
    stats: EngineStats
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CallResult:
    """The answer to a Call: a value, or the text of the error."""

    call_id: int
    value: Any = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Dead:
    """The last message: the engine cannot go on."""

    cause: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The engine's process lives, even in the middle of a long step. Only the reader of its pipe sees this message."""


UpMessage = Ready | StartFailed | StepOutputs | CallResult | Dead
