"""Where the requests of a batch go: to a server at a URL, or to the server's own application in this process.

Milestone: M8. vLLM counterpart: build_async_engine_client as vllm/entrypoints/openai/run_batch.py uses it. vLLM calls
its serving classes; here a request passes through the whole application, only the socket is missing. So a batch has the
server's checks, the server's answers and the server's errors.
"""

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from folovllm.entrypoints.commands.serve_options import ServeCommand
from folovllm.entrypoints.openai.batch import Send
from folovllm.entrypoints.openai_client import Answer, Body, OpenAIClient, read_json

SERVER_REQUESTS = 64  # at a time; the server queues what it cannot run
NO_LIMIT = 10**9


@asynccontextmanager
async def server_at(url: str, api_key: str | None) -> AsyncIterator[tuple[Send, int]]:
    """Yields the function that sends a request to the server, and how many to send at a time.

    Raises ServerError if there is no server.
    """
    async with OpenAIClient(url, api_key) as client:
        card = await client.model_card()

        async def send(path: str, body: Body) -> Answer:
            return await client.send("POST", path.removeprefix("/v1"), {"model": card["id"]} | body)

        yield send, SERVER_REQUESTS


@asynccontextmanager
async def engine_here(command: ServeCommand) -> AsyncIterator[tuple[Send, int]]:
    """Starts the engine, and yields the function that answers a request, and how many to send at a time.

    Raises EngineDeadError if the engine cannot start, and at the end if it has died meanwhile.
    """
    from folovllm.entrypoints.openai.app import build_app
    from folovllm.entrypoints.openai.lifecycle import read_template
    from folovllm.entrypoints.openai.state import make_state
    from folovllm.entrypoints.start import start_async_llm

    template = read_template(command.options.chat_template)
    engine = await start_async_llm(
        preset=command.preset,
        without=command.without,
        in_process=not command.options.disable_frontend_multiprocessing,
        **command.engine_args,
    )
    try:
        # The batch itself limits how many requests are there at a time: no request may find the queue full.
        options = dataclasses.replace(command.options, max_queue=NO_LIMIT, disable_uvicorn_access_log=True)
        app = build_app(make_state(engine, options, template))
        yield functools.partial(post, app), 2 * engine.num_engines * engine.config.max_num_seqs
        engine.check_health()
    finally:
        await engine.shutdown()


async def post(app: ASGIApp, path: str, body: Body) -> Answer:
    """Sends `body` to a route of `app` and returns its answer. If the caller is cancelled, the request is aborted."""
    data = json.dumps(body).encode()
    start: dict[str, Any] = {}
    parts: list[bytes] = []
    is_sent = False

    async def receive() -> Message:
        """The whole body; after it nothing, as this client does not leave before its answer."""
        nonlocal is_sent
        if is_sent:
            await asyncio.Event().wait()
        is_sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(_scope(path, len(data)), receive, send)
    return Answer(start["status"], read_json(b"".join(parts)), Headers(raw=start["headers"]))


def _scope(path: str, size: int) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(size).encode())],
        "client": None,
        "server": None,
        "state": {},
    }
