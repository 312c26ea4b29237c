"""HttpServer: uvicorn with the settings of `folovllm serve`.

Milestone: M8. vLLM counterpart: vllm/entrypoints/launcher.py (serve_http).
"""

import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn

from folovllm.entrypoints.openai.app import build_app
from folovllm.entrypoints.openai.http_protocol import HttpProtocol
from folovllm.entrypoints.openai.listen import why_not_bound
from folovllm.entrypoints.openai.state import ServerState

SECONDS_TO_FLUSH = 3  # for the last bytes of the answers; a client that does not read gets no more
SECONDS_KEEP_ALIVE = 60  # an idle connection stays open this long


class HttpServer(uvicorn.Server):
    """Leaves signals to the caller, and calls `on_ready` as soon as it listens."""

    def __init__(self, state: ServerState, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            build_app(state),
            http=HttpProtocol,
            lifespan="off",
            ws="none",
            log_config=None,  # lifecycle.log_to_stderr
            access_log=False,  # middleware.RequestLog has the id and no query string
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=SECONDS_KEEP_ALIVE,
            timeout_graceful_shutdown=SECONDS_TO_FLUSH,
        )
        super().__init__(config)
        self.on_ready = on_ready
        self.options = state.options

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two servers that start at the same time can both bind a port
            raise ValueError(why_not_bound(self.options, error)) from None
        if self.started:
            self.on_ready()
