"""`folovllm chat`: a conversation in the terminal, in which each answer is printed as it is generated.

Milestone: M1. vLLM counterpart: vllm/entrypoints/cli/openai.py (`vllm chat`, against a server). Left out: images,
tools, saving a conversation.

Only answers go to stdout. Hints, errors and speeds go to stderr, so `echo hi | folovllm chat > answer` is clean.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from folovllm.entrypoints.commands.options import DebugOption, EngineOptions, SamplingOptions, with_options
from folovllm.interrupts import HeldInterrupts
from folovllm.sampling_params import SamplingParams
from folovllm.text_files import stdin_lines

if TYPE_CHECKING:
    from folovllm.entrypoints.llm import LLM

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
    debug: DebugOption = False,
) -> None:
    """Talk to the model, over as many turns as you like. /help lists what you can type.

    \b
      folovllm chat
      folovllm chat --temperature 0 --system "You answer in one sentence."
      folovllm chat --mine
      echo "What is the capital of France?" | folovllm chat
    """
    sampling.sampling_params(**DEFAULTS)  # a wrong option is refused before the model is loaded
    llm = engine.load()
    conversation = Conversation(llm, sampling.sampling_params(**DEFAULTS | llm.sampling_defaults()), system)
    if sys.stdin.isatty():
        _note(f"{llm.config.model_config.shown_name}: type a message; /help lists commands, Ctrl-D leaves")
    for line in _lines():
        if not _handle(conversation, line.strip()):
            return


class Conversation:
    """The turns so far and the engine that answers. A question that fails leaves the conversation unchanged."""

    def __init__(self, llm: "LLM", params: SamplingParams, system: str | None = None) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.turns: list[dict[str, Any]] = []  # user, assistant, user, assistant, ...

    def ask(self, text: str) -> None:
        """Prints the answer to `text` and remembers both. Ctrl-C ends the answer early; what was printed counts as the
        answer.
        """
        turns, prompt = self._fit([*self.turns, {"role": "user", "content": text}])
        answer = ""
        start, first, num_tokens, reason = time.monotonic(), None, 0, None
        with HeldInterrupts() as interrupts:
            for output in self.llm.stream(prompt, self.params):
                first = first or time.monotonic()
                completion = output.outputs[0]
                answer += completion.text
                num_tokens += len(completion.token_ids)
                typer.echo(completion.text, nl=False)
                reason = "stopped" if interrupts.count else completion.finish_reason
                if interrupts.count:
                    break
            interrupts.clear()  # ending the answer is what Ctrl-C was for
        typer.echo()
        _note(_speed(num_tokens, time.monotonic() - start, (first or start) - start, reason))
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _fit(self, turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Drops the oldest exchanges until the prompt leaves room to answer. Returns the remaining turns and the
        prompt.

        E.g. max_model_len 512, max_tokens 512: the prompt may have 384 tokens, so that an answer has at least 128.
        """
        limit = self.llm.config.max_model_len
        room = min(self.params.max_tokens or limit, limit // 4)
        prompt, total = self._prompt(turns), len(turns)
        while len(turns) > 1 and len(prompt["prompt_token_ids"]) + room > limit:
            turns = turns[2:]
            prompt = self._prompt(turns)
        if len(turns) < total:
            _note(f"the conversation no longer fits in {limit} tokens: forgot the oldest {total - len(turns)} messages")
        return turns, prompt

    def _prompt(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.llm.chat_prompt(system + turns)


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
