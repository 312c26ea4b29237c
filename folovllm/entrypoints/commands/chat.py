"""`folovllm chat`: a conversation in the terminal, in which each answer is printed as it is generated.

Milestone: M1; with --url, M8. vLLM counterpart: vllm/entrypoints/cli/openai.py (`vllm chat`). Left out: images, tools,
saving a conversation. chat_models.py has what answers: an engine in this process, or a server.

Only answers go to stdout. Hints, errors and speeds go to stderr, so `echo hi | folovllm chat > answer` is clean.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from folovllm.entrypoints.commands.chat_models import ChatModel, LocalModel, Message, ServedModel
from folovllm.entrypoints.commands.options import (
    ApiKeyOption,
    DebugOption,
    EngineOptions,
    SamplingOptions,
    UrlOption,
    with_options,
)
from folovllm.interrupts import HeldInterrupts
from folovllm.text_files import stdin_lines

DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}
HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt; without TEXT, remove it
/help          this
/exit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


@with_options
def chat(
    engine: EngineOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="The system prompt.", metavar="TEXT")] = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    debug: DebugOption = False,
) -> None:
    """Talk to the model, over as many turns as you like. /help lists what you can type.

    With --url the model is a server's: --model is the name that the server gives it (default: its first one), and a
    sampling option that you leave out is the server's.

    \b
      folovllm chat
      folovllm chat --temperature 0 --system "You answer in one sentence."
      folovllm chat --mine
      folovllm chat --url http://127.0.0.1:8000
      echo "What is the capital of France?" | folovllm chat
    """
    sampling.sampling_params(**DEFAULTS)  # a wrong option is refused before the model is loaded
    with contextlib.closing(_model(engine, sampling, url, api_key)) as model:
        conversation = Conversation(model, system)
        if sys.stdin.isatty():
            _note(f"{model.name}: type a message; /help lists commands, Ctrl-D leaves")
        for line in _lines():
            if not _handle(conversation, line.strip()):
                return


def _model(engine: EngineOptions, sampling: SamplingOptions, url: str | None, api_key: str | None) -> ChatModel:
    if url is None:
        if api_key is not None:
            raise ValueError("--api-key is for a server: name it with --url")
        llm = engine.load()
        return LocalModel(llm, sampling.sampling_params(**DEFAULTS | llm.sampling_defaults()))
    engine.refuse_with_url()
    fields = {"max_tokens": DEFAULTS["max_tokens"], **sampling.given()}
    fields.pop("logprobs", None)  # nothing shows them
    return ServedModel(url, api_key, engine.model, fields)


class Conversation:
    """The turns so far and the model that answers. A question that fails leaves the conversation unchanged."""

    def __init__(self, model: ChatModel, system: str | None = None) -> None:
        self.model = model
        self.system = system
        self.turns: list[Message] = []  # user, assistant, user, assistant, ...

    def ask(self, text: str) -> None:
        """Prints the answer to `text` and remembers both. Ctrl-C ends the answer early; what was printed counts as the
        answer.
        """
        turns = self._fit([*self.turns, {"role": "user", "content": text}])
        answer = ""
        start, first, num_tokens, reason = time.monotonic(), None, 0, None
        with HeldInterrupts() as interrupts, contextlib.closing(self.model.stream(self._messages(turns))) as pieces:
            try:
                for piece in pieces:
                    if piece.num_tokens:
                        first = first or time.monotonic()
                    answer += piece.text
                    num_tokens += piece.num_tokens
                    if piece.text:
                        typer.echo(piece.text, nl=False)
                    reason = "stopped" if interrupts.count else piece.finish_reason or reason
                    if interrupts.count:
                        break
            finally:
                if answer:
                    typer.echo()  # before the message of an error, too
            interrupts.clear()  # ending the answer is what Ctrl-C was for
        if not answer:
            typer.echo()
        _note(_speed(num_tokens, time.monotonic() - start, (first or start) - start, reason))
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _fit(self, turns: list[Message]) -> list[Message]:
        """Drops the oldest exchanges until the prompt leaves room to answer. Returns the remaining turns.

        E.g. a limit of 512, max_tokens 512: the prompt may have 384 tokens, so that an answer has at least 128. Nothing
        is dropped if a server does not say how long a prompt is; the server then refuses what does not fit.
        """
        limit, total = self.model.limit, len(turns)
        if limit is None:
            return turns
        room = min(self.model.max_tokens or limit, limit // 4)
        while len(turns) > 1 and (self.model.count_tokens(self._messages(turns)) or 0) + room > limit:
            turns = turns[2:]
        if len(turns) < total:
            _note(f"the conversation no longer fits in {limit} tokens: forgot the oldest {total - len(turns)} messages")
        return turns

    def _messages(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


def _handle(conversation: Conversation, line: str) -> bool:
    """Handles one line. Returns False if the user wants to leave. A ValueError ends the turn, not the program."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/help":
        _note(HELP)
    elif command == "/reset":
        conversation.turns = []
        _note("forgotten")
    elif command == "/system":
        conversation.system = rest.strip() or None
        _note("system prompt " + ("set" if conversation.system else "removed"))
    elif command.startswith("/"):
        _note(f"unknown command {command}\n{HELP}")
    elif line:
        try:
            conversation.ask(line)
        except ValueError as error:
            typer.secho(f"error: {error}", fg="red", err=True)
    return True


def _lines() -> Iterator[str]:
    """What the user types or pipes in, line by line, until the end of the input."""
    return _typed_lines() if sys.stdin.isatty() else stdin_lines()


def _typed_lines() -> Iterator[str]:
    """Lines of a terminal, until Ctrl-D. Ctrl-C only clears the line."""
    with contextlib.suppress(ImportError):  # arrow keys and history, where there is readline
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            _note("\nCtrl-D or /exit leaves")


def _speed(num_tokens: int, seconds: float, first: float, reason: str | None) -> str:
    text = f"{num_tokens} tokens, {num_tokens / max(seconds, 1e-9):.1f} tok/s, first after {first:.2f} s"
    return text + {"stopped": ", stopped", "length": ", cut off (--max-tokens, --max-model-len)"}.get(reason or "", "")


def _note(text: str) -> None:
    typer.secho(text, dim=True, err=True)
