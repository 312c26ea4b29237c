"""build_app: the server as a Ray Serve deployment, with as many replicas as there are requests for.

Milestone: M10. vLLM counterpart: none; Ray has its own for vLLM, ray.serve.llm.build_openai_app.
Left out: one application for several models, prefill and decode on different replicas, routing by prefix.

    serve run folovllm.entrypoints.ray_serve:build_app model=smollm2-135m max_replicas=4

    from ray import serve
    serve.run(build_app({"model": "smollm2-135m", "max_replicas": 4}))

A replica is a whole server without its socket: the same routes, the same checks, and an engine of its own. Ray Serve
has the socket and sends each request to a replica that has few. It starts more replicas when the requests become many,
ends them when they become few, and replaces a replica whose engine has died. `folovllm serve --data-parallel-size N`
knows which engine has which prefix; Ray Serve knows how to grow.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from folovllm.checks import check_int, check_number
from folovllm.config import DEFAULT_MAX_NUM_SEQS, EngineConfig
from folovllm.distributed.ray_cluster import import_ray
from folovllm.entrypoints.commands.options import parse_value
from folovllm.entrypoints.openai.server_options import ServerOptions

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from folovllm.engine.async_llm import AsyncLLM

_SOCKET = ("host", "port", "uds")  # options of a server that has a socket


@dataclass(frozen=True)
class ScalingOptions:
    """How many replicas there are, and what one of them takes of the cluster."""

    min_replicas: int = 1  # 0: the first request waits until a replica has started
    max_replicas: int = 1
    target_ongoing_requests: float | None = None  # per replica; more start another one; None: max_num_seqs
    num_cpus: float = 1  # of the cluster, for one replica; without cpu_threads the engine computes with so many threads
    num_gpus: float = 0  # the same

    def __post_init__(self) -> None:
        check_int("min_replicas", self.min_replicas, low=0)
        check_int("max_replicas", self.max_replicas, low=max(1, self.min_replicas), hint="at least min_replicas")
        if self.target_ongoing_requests is not None:
            check_number("target_ongoing_requests", self.target_ongoing_requests, 0.0, 1e6, low_open=True)
        check_number("num_cpus", self.num_cpus, 0.0, 1e6)
        check_number("num_gpus", self.num_gpus, 0.0, 1e6)


@dataclass(frozen=True)
class ReplicaArguments:
    """What a replica is made with, checked."""

    engine_args: dict[str, Any]
    options: ServerOptions
    preset: str | None = None
    without: tuple[str, ...] = ()

    @property
    def max_num_seqs(self) -> int:
        """How many requests one replica computes at once."""
        config = EngineConfig.from_args(preset=self.preset, without=self.without, **self.engine_args)
        device = "cuda" if config.device == "cuda" else "cpu"
        return config.scheduler_config.max_num_seqs or DEFAULT_MAX_NUM_SEQS[device]


def build_app(args: Mapping[str, Any]) -> Any:
    """Returns the application for `serve.run`: a `ray.serve.Application`.

    `args` holds engine arguments (model, max_model_len, ...), options of `folovllm serve` (api_key, max_queue, ...),
    preset and without, and those of ScalingOptions. On a command line the values are text, and are read as
    `--engine-arg` reads them. Raises ValueError for a bad one, before anything starts.
    """
    import_ray("folovllm.entrypoints.ray_serve")
    from ray import serve

    replica, scaling = parse_args(args)
    deployment: Any = serve.deployment(serve.ingress(Gateway(replica))(Replica))
    limit = replica.max_num_seqs + replica.options.max_queue
    return deployment.options(
        name="folovllm",
        max_ongoing_requests=limit,  # of one replica; Ray Serve keeps the others waiting
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests or replica.max_num_seqs,
        },
        ray_actor_options={"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
    ).bind()


def parse_args(args: Mapping[str, Any]) -> tuple[ReplicaArguments, ScalingOptions]:
    """Sorts the arguments of `build_app` by what they are for, and checks them."""
    given = {name: parse_value(value) if isinstance(value, str) else value for name, value in args.items()}
    for name in (*_SOCKET, "data_parallel_size"):
        if name in given:
            instead = "serve.start(http_options=...)" if name in _SOCKET else "min_replicas and max_replicas"
            raise ValueError(f"{name} is not for a replica of Ray Serve: use {instead}")
    scaling = ScalingOptions(**_take(given, ScalingOptions))
    own = _take(given, ServerOptions)
    for name in ("api_key", "allowed_origins"):
        if isinstance(own.get(name), str):
            own[name] = (own[name],)
    preset, without = given.pop("preset", None), given.pop("without", ())
    without = (without,) if isinstance(without, str) else tuple(without)
    replica = ReplicaArguments({"disable_log_stats": False} | given, ServerOptions(**own), preset, without)
    EngineConfig.from_args(preset=preset, without=without, **replica.engine_args)
    return replica, scaling


def _take(given: dict[str, Any], cls: Any) -> dict[str, Any]:
    """Takes those of the arguments that are fields of `cls`."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: given.pop(name) for name in names if name in given}


class Replica:
    """The deployment's class. Ray Serve makes it an ASGI application: `app` is the replica's Gateway."""

    app: "Gateway"

    async def check_health(self) -> None:
        """Ray Serve calls this every few seconds, and replaces the replica if it raises."""
        self.app.check_health()


class Gateway:
    """An ASGI application that starts the engine with the application, and hands all requests to the real one."""

    def __init__(self, arguments: ReplicaArguments) -> None:
        self._arguments = arguments
        self._engine: AsyncLLM | None = None
        self._app: ASGIApp | None = None

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            assert self._app is not None, "a request before the end of the start"
            await self._app(scope, receive, send)

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine is dead."""
        if self._engine is not None:
            self._engine.check_health()

    async def _live(self, receive: "Receive", send: "Send") -> None:
        """From the start of the replica to its end."""
        await receive()
        try:
            await self._start()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._engine is not None:
            await self._engine.shutdown()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        from folovllm.entrypoints.openai.app import build_app as build_asgi_app
        from folovllm.entrypoints.openai.lifecycle import read_template
        from folovllm.entrypoints.openai.state import make_state
        from folovllm.entrypoints.start import start_async_llm

        arguments, options = self._arguments, self._arguments.options
        template = read_template(options.chat_template)
        self._engine = await start_async_llm(
            preset=arguments.preset,
            without=arguments.without,
            in_process=not options.disable_frontend_multiprocessing,
            **arguments.engine_args,
        )
        self._app = build_asgi_app(make_state(self._engine, options, template))
