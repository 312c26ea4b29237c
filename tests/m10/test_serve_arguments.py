"""The arguments of the Ray Serve application, and its ASGI part, without Ray."""

import asyncio
from typing import Any

import pytest

from folovllm.engine.async_llm import EngineDeadError
from folovllm.entrypoints.ray_serve import Gateway, ReplicaArguments, parse_args

pytestmark = pytest.mark.m10


def test_arguments_go_where_they_belong():
    """On the command line of `serve run` every value is text."""
    replica, scaling = parse_args(
        {"model": "tiny", "max_model_len": "128", "api_key": "secret", "max_replicas": "3", "preset": "m6"}
    )
    assert replica.engine_args == {"model": "tiny", "max_model_len": 128, "disable_log_stats": False}
    assert replica.options.api_key == ("secret",) and replica.preset == "m6"
    assert (scaling.min_replicas, scaling.max_replicas, scaling.num_cpus) == (1, 3, 1)
    assert parse_args({"without": "m6"})[0].without == ("m6",)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"port": 9000}, r"port is not for a replica .*http_options"),
        ({"data_parallel_size": 2}, r"use min_replicas and max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas must be at least 3"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests"),
        ({"num_cpus": -1}, "num_cpus"),
        ({"max_queue": -1}, "max_queue"),
        ({"block_sise": 16}, "block_size"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"preset": "m99"}, "m99"),
    ],
)
def test_bad_arguments_are_told_before_anything_starts(args, message):
    with pytest.raises(ValueError, match=message):
        parse_args(args)


class Lifespan:
    """A server that starts an application, and ends it."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def run(self, app: Gateway) -> asyncio.Task[None]:
        return asyncio.create_task(app({"type": "lifespan"}, self.events.get, self.sent.put))


def test_the_gateway_starts_and_ends_the_engine(tiny_model_dir):
    from folovllm.entrypoints.openai.senders import post

    args = {"model": str(tiny_model_dir("llama")), "max_model_len": 64, "disable_frontend_multiprocessing": True}
    gateway = Gateway(parse_args(args)[0])

    async def live() -> None:
        lifespan = Lifespan()
        gateway.check_health()
        task = lifespan.run(gateway)
        await lifespan.events.put({"type": "lifespan.startup"})
        assert (await lifespan.sent.get())["type"] == "lifespan.startup.complete"
        answer = await post(gateway, "/v1/completions", {"prompt": "the", "max_tokens": 2})
        assert answer.status == 200
        gateway.check_health()
        gateway._engine._die("the test says so")  # type: ignore[union-attr]
        with pytest.raises(EngineDeadError, match="the test says so"):
            gateway.check_health()
        await lifespan.events.put({"type": "lifespan.shutdown"})
        assert (await lifespan.sent.get())["type"] == "lifespan.shutdown.complete"
        await task

    asyncio.run(live())


def test_an_engine_that_cannot_start_fails_the_start():
    gateway = Gateway(ReplicaArguments({"model": "./nowhere"}, parse_args({})[0].options))

    async def live() -> None:
        lifespan = Lifespan()
        task = lifespan.run(gateway)
        await lifespan.events.put({"type": "lifespan.startup"})
        failed = await lifespan.sent.get()
        assert failed["type"] == "lifespan.startup.failed" and "nowhere" in failed["message"]
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(live())
