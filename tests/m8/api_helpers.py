"""Calls of the server's routes on the event loop of the test: the real application and engine, no socket, no weights.

The fake model's logprobs are made up: token t has -0.25 * (t + 1) everywhere, so its rank is t + 1.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.tokenizer import Tokenizer
from folovllm.entrypoints.openai.app import build_app
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.sse import EventStream
from folovllm.entrypoints.openai.state import ServerState, make_state
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import TokenLogprobs
from folovllm.sampling_params import SamplingParams
from tests.m1.tiny_tokenizers import EOS, byte_level
from tests.m8.serving_helpers import VOCAB_SIZE, assert_all_free, make_async_llm, run_async

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for document in documents or [] %}({{ document.text }}){% endfor %}"
    "{% if shout %}!{% endif %}"
    "{% for message in messages %}<|user|>{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def logprob_of(token_id: int) -> float:
    return -0.25 * (token_id + 1)


def made_up(token_id: int, count: int) -> TokenLogprobs:
    """The sampler's form: the token itself, then the likeliest, which are 0, 1, 2, ..."""
    ids = [token_id, *range(count)]
    return TokenLogprobs(ids, [logprob_of(i) for i in ids], token_id + 1)


class LogprobsExecutor(FakeExecutor):
    """The fake model, with logprobs for the requests that ask for them."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB_SIZE)
        self.params: dict[str, tuple[SamplingParams, int]] = {}  # and the length of the prompt

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        for new in scheduler_output.scheduled_new_reqs:
            self.params[new.request_id] = (new.sampling_params, len(new.prompt_token_ids))
        return super().execute(scheduler_output)

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        output = super().sample(handle)
        for request_id, num_tokens in handle.num_scheduled_tokens.items():
            (params, prompt_len), state = self.params[request_id], self.requests[request_id]
            if params.logprobs is not None:
                sampled = output.sampled_token_ids[request_id]
                output.logprobs[request_id] = [made_up(i, params.logprobs) for i in sampled]
            if params.prompt_logprobs is not None:
                end = min(state.num_computed_tokens + 1, prompt_len)
                computed = state.token_ids[state.num_computed_tokens - num_tokens + 1 : end]
                output.prompt_logprobs[request_id] = [made_up(i, params.prompt_logprobs) for i in computed]
        return output


def logprobs_executor(config: EngineConfig) -> LogprobsExecutor:
    return LogprobsExecutor()


class SlowExecutor(LogprobsExecutor):
    """Takes its time: what a test does in the middle of an answer is done in the middle."""

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        time.sleep(0.01)
        return super().execute(scheduler_output)


def slow_executor(config: EngineConfig) -> SlowExecutor:
    return SlowExecutor()


def chat_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level().backend, {"eos_token": EOS}, {"default": CHAT_TEMPLATE})


@dataclass
class Answer:
    """What came back. `pieces` are the parts of the body in the order in which they were sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.pieces))

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error

    @property
    def events(self) -> list[str]:
        return EventStream().feed(b"".join(self.pieces))

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The events of a stream, decoded. Asserts that the last one is [DONE]."""
        *chunks, done = self.events
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]


@dataclass
class Client:
    """Calls the application as a web server would. `leaving`, once set, is a client that has closed the connection."""

    app: FastAPI
    engine: AsyncLLM
    state: ServerState

    async def post(
        self,
        path: str,
        body: Any,
        headers: dict[str, str] | None = None,
        leaving: asyncio.Event | None = None,
        answer: Answer | None = None,
    ) -> Answer:
        """Posts a body: JSON data, or bytes. `answer`, if given, is filled while the call runs."""
        answer = Answer() if answer is None else answer
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        messages = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await (leaving or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {key.decode(): value.decode() for key, value in message["headers"]}
            elif message["body"]:
                answer.pieces.append(message["body"])

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(key.lower().encode(), value.encode()) for key, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        await self.app(scope, receive, send)
        return answer

    async def complete(self, **fields: Any) -> Answer:
        """Posts to /v1/completions: greedy, and to the last token, unless the fields say otherwise."""
        return await self.post("/v1/completions", {"temperature": 0, "ignore_eos": True, **fields})

    async def chat(self, content: Any = "Hi", **fields: Any) -> Answer:
        """Posts a message of a user, or a whole conversation, to /v1/chat/completions."""
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        defaults = {"temperature": 0, "ignore_eos": True, "max_tokens": 4}
        return await self.post("/v1/chat/completions", {"messages": messages, **defaults, **fields})


@contextlib.asynccontextmanager
async def make_client(options: dict[str, Any] | None = None, **engine_args: Any) -> AsyncIterator[Client]:
    """The whole server without its socket. `options` are those of ServerOptions, the rest those of make_async_llm."""
    defaults: dict[str, Any] = {"executor_factory": logprobs_executor, "tokenizer": chat_tokenizer()}
    async with make_async_llm(**{**defaults, **engine_args}) as engine:
        state = make_state(engine, ServerOptions(**options or {}))
        yield Client(build_app(state), engine, state)


def with_client(**arguments: Any) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Decorator for an async test, whose first parameter is a Client of a server with these arguments.

    After each test nothing may be left in the engine.
    """

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            async def main() -> None:
                async with make_client(**arguments) as client:
                    await test(client, **fixtures)
                    await assert_all_free(client.engine)

            run_async(main)

        signature = inspect.signature(test)
        run.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
        return run

    return decorate


def join_choices(chunks: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """What a client makes of the chunks of a completion: per choice, texts, ids and logprobs are joined."""
    joined: list[dict[str, Any]] = [{} for _ in range(count)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = joined[choice["index"]]
            for key, value in choice.items():
                whole[key] = _join(whole.get(key), value)
    return joined


def _join(before: Any, new: Any) -> Any:
    if isinstance(before, dict) and isinstance(new, dict):
        return {key: _join(before.get(key), new.get(key)) for key in before | new}
    if isinstance(before, (str, list)) and isinstance(new, (str, list)):
        return before + new
    return before if new is None else new
