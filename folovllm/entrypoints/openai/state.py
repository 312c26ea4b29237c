"""ServerState: what all routes share.

Milestone: M8. vLLM counterpart: `app.state`, filled by init_app_state in vllm/entrypoints/openai/api_server.py.

A route reaches the state as `request.app.state.server`, or through `server_state(request)`.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request

from folovllm.config import ModelConfig
from folovllm.engine.async_llm import AsyncLLM
from folovllm.entrypoints.openai.errors import not_found, shutting_down, too_many_requests
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.sse import EventStream
from folovllm.metrics.prometheus import ServerMetrics
from folovllm.parts import load_part


@dataclass
class ServerState:
    """The engine, the options, and the counts that a route reads or changes. It lives on the event loop only."""

    engine: AsyncLLM
    options: ServerOptions
    model_names: list[str]  # the first one is shown; all are accepted
    metrics: ServerMetrics
    event_stream: EventStream  # the part "serve.event_stream": how an event of a stream is written
    chat_template: str | None = None  # the text of --chat-template
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    unknown_fields: set[str] = field(default_factory=set)  # those that the log has named already
    num_admitting: int = 0  # requests that have passed `admit` and are not in the engine yet

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) unless `name` is served here, empty or missing."""
        if name and name not in self.model_names:
            served = ", ".join(map(repr, self.model_names))
            raise not_found(
                f"the model {name!r} does not exist; this server has {served}", "model", code="model_not_found"
            )

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Those of the model's generation_config.json."""
        return self.engine.sampling_defaults

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Wraps the adding of `count` completions to the engine: prompts x n.

        Raises ApiError 503 if the server is shutting down, and 429 if as many requests as it may hold are there. A
        request that finds room is admitted whole, so an idle server takes any number of prompts. What is being
        tokenised counts, too.
        """
        if self.is_draining:
            raise shutting_down()
        limit = self.engine.num_engines * self.engine.config.max_num_seqs + self.options.max_queue
        if self.engine.num_unfinished + self.num_admitting >= limit:
            raise too_many_requests(
                f"{limit} requests are running or waiting, which is all that this server holds (max_num_seqs + "
                "max_queue); try again in a second"
            )
        self.num_admitting += count
        try:
            yield
        finally:
            self.num_admitting -= count


def server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def make_state(engine: AsyncLLM, options: ServerOptions, chat_template: str | None = None) -> ServerState:
    """The state of a new server; its metrics observe `engine` from here on."""
    config, names = engine.config, served_names(engine.config.model_config)
    metrics = ServerMetrics(names[0], config, engine.kv_cache_config, log_stats=not config.disable_log_stats)
    for observer in metrics.observers:
        engine.add_observer(observer)
    event_stream = load_part("serve.event_stream", config.parts)()
    return ServerState(engine, options, names, metrics, event_stream, chat_template)


def served_names(model: ModelConfig) -> list[str]:
    """The names that clients use: --served-model-name, or the model's. A folder has its last part as its name."""
    names = model.served_model_name
    if names:
        return [names] if isinstance(names, str) else list(names)
    path = Path(model.model).expanduser()
    is_folder = model.model.startswith((".", "/", "~")) or path.is_dir()
    return [path.resolve().name if is_folder else model.model]
