"""ServerOptions: the options of `folovllm serve` that are the server's own, typed, validated and frozen.

Milestone: M8. vLLM counterpart: FrontendArgs (vllm/entrypoints/openai/cli_args.py). Left out: TLS and middlewares (put
a reverse proxy in front), tool and reasoning parsers, LoRA. `folovllm.entrypoints.commands.serve_options` says so to a
user who asks for them.

Nothing here imports the web framework: a wrong option is answered at once. The comment behind a field is its help text.
"""

from dataclasses import dataclass
from pathlib import Path

from folovllm.checks import check_bool, check_choice, check_int, check_number

MIB = 2**20
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True)
class ServerOptions:
    """The options of `folovllm serve` that are the server's own. Raises ValueError for a value out of range."""

    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: every network of this machine
    port: int = 8000  # the port to listen on; 0: any free one, which the start names
    uds: str | None = None  # listen on this Unix domain socket instead of host and port
    api_key: tuple[str, ...] = ()  # clients of /v1 need one of these keys; repeatable
    chat_template: str | None = None  # a file with a jinja template, or the template itself; None: the model's
    max_queue: int = 256  # requests that may wait beyond max_num_seqs; more are answered 429
    max_body_size: int = 32 * MIB  # bytes of a request's body; a larger one is answered 413
    allowed_origins: tuple[str, ...] = ()  # web pages of these origins may call the server (CORS), a JSON list or "*"
    root_path: str = ""  # the path under which a proxy shows the server
    shutdown_timeout: float = 30.0  # seconds that open answers get after SIGTERM or Ctrl-C
    log_requests: bool = False  # log the sampling parameters and the lengths of each request, never its text
    disable_uvicorn_access_log: bool = False  # do not log a line for each request
    uvicorn_log_level: str = "warning"  # of the HTTP library: critical, error, warning, info, debug or trace
    disable_fastapi_docs: bool = False  # no /openapi.json
    disable_frontend_multiprocessing: bool = False  # run the engine in a thread instead of a process

    def __post_init__(self) -> None:
        check_int("port", self.port, low=0, high=65535)
        check_int("max_queue", self.max_queue, low=0)
        check_int("max_body_size", self.max_body_size, low=1)
        check_number("shutdown_timeout", self.shutdown_timeout, 0.0, 86400.0)
        if self.uds is not None and not Path(self.uds).name:
            raise ValueError(f"uds must be the path of a file, got {self.uds!r}")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(
                f"root_path must begin with a slash and not end with one, as in /llm, got {self.root_path!r}"
            )
        check_choice("uvicorn_log_level", self.uvicorn_log_level, LOG_LEVELS)
        for name in (
            "log_requests",
            "disable_uvicorn_access_log",
            "disable_fastapi_docs",
            "disable_frontend_multiprocessing",
        ):
            check_bool(name, getattr(self, name))
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable():
                raise ValueError("api_key must be printable ASCII and not empty: a client sends it in a header")
