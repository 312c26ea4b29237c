"""What answers in `folovllm chat`: LocalModel, an engine in this process, or ServedModel, a server at a URL.

Milestone: M1; ServedModel M8. vLLM counterpart: none for the first; for the second, the package `openai` that its
`chat` command uses.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from folovllm.interrupts import HeldInterrupts
from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folovllm.entrypoints.llm import LLM

Message = dict[str, Any]
T = TypeVar("T")
POLL_SECONDS = 0.1  # how soon Ctrl-C is noticed while a server says nothing


@dataclass(frozen=True)
class Piece:
    """What an answer has gained. A server that is silent brings empty pieces, so that the caller can look at Ctrl-C."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None


Pieces = Generator[Piece, None, None]


class ChatModel(Protocol):
    """A model that answers conversations."""

    name: str
    limit: int | None  # tokens of a prompt and its answer, or None if a server does not say
    max_tokens: int | None  # the longest answer

    def count_tokens(self, messages: list[Message]) -> int | None:
        """Returns the length of the prompt that these messages make, or None if a server does not say."""

    def stream(self, messages: list[Message]) -> Pieces:
        """The answer, piece by piece. If the generator is closed early, the request ends in the engine, too."""

    def close(self) -> None:
        """Ends the connection."""


class LocalModel:
    """An LLM in this process."""

    def __init__(self, llm: "LLM", params: SamplingParams) -> None:
        self.llm, self.params = llm, params
        self.name = llm.config.model_config.shown_name
        self.limit: int | None = llm.config.max_model_len
        self.max_tokens = params.max_tokens

    def count_tokens(self, messages: list[Message]) -> int | None:
        return len(self.llm.chat_prompt(messages)["prompt_token_ids"])

    def stream(self, messages: list[Message]) -> Pieces:
        for output in self.llm.stream(self.llm.chat_prompt(messages), self.params):
            completion = output.outputs[0]
            yield Piece(completion.text, len(completion.token_ids), completion.finish_reason)

    def close(self) -> None:
        """The process ends with the command."""


class ServedModel:
    """A model of a server. `fields` are the sampling fields of every request; `model` None takes the first one.

    Raises ServerError if there is no server, or no such model.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, fields: dict[str, Any]) -> None:
        from folovllm.entrypoints.openai_client import OpenAIClient

        self.fields = fields
        self.max_tokens: int | None = fields.get("max_tokens")
        self._client = OpenAIClient(url, api_key)
        self._runner = asyncio.Runner()
        try:
            self._run(self._client.__aenter__())
            card = self._run(self._client.model_card(model))
        except BaseException:
            self.close()
            raise
        self.name = str(card["id"])
        limit = card.get("max_model_len")
        self.limit = limit if isinstance(limit, int) else None

    def count_tokens(self, messages: list[Message]) -> int | None:
        return self._run(self._client.count_tokens(self.name, messages))

    def stream(self, messages: list[Message]) -> Pieces:
        """Runs the event loop from piece to piece. It stands still in between, so nothing happens unseen."""
        fields = {**self.fields, "stream_options": {"include_usage": True}}
        events = self._client.stream_chat(self.name, messages, **fields)
        num_tokens = 0
        task: asyncio.Task[dict[str, Any] | None] | None = None
        try:
            while True:
                task = task or self._runner.get_loop().create_task(_next(events))
                self._run(asyncio.wait([task], timeout=POLL_SECONDS))
                if not task.done():
                    yield Piece()
                    continue
                event, task = task.result(), None
                if event is None:
                    return
                piece = read_piece(event, num_tokens)
                num_tokens += piece.num_tokens
                yield piece
        finally:
            if task is not None:
                task.cancel()
                self._run(asyncio.wait([task]))
            self._run(events.aclose())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    def close(self) -> None:
        with HeldInterrupts(patience=None):
            self._run(self._client.__aexit__(None, None, None))
            self._runner.close()  # ends what an interrupted call has left


async def _next(events: AsyncGenerator[T, None]) -> T | None:
    return await anext(events, None)


def read_piece(event: dict[str, Any], num_tokens: int) -> Piece:
    """One event of a streamed chat. A chunk with text counts as a token until the last event brings the true number."""
    usage, choices = event.get("usage") or {}, event.get("choices") or []
    if isinstance(usage.get("completion_tokens"), int) and not choices:
        return Piece(num_tokens=usage["completion_tokens"] - num_tokens)
    if not choices:
        return Piece()
    text = (choices[0].get("delta") or {}).get("content") or ""
    return Piece(text, int(bool(text)), choices[0].get("finish_reason"))
