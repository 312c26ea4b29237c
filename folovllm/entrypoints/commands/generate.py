"""`folovllm generate`: complete one prompt as it is generated, or several together.

Milestone: M1. vLLM counterpart: vllm/entrypoints/cli/openai.py (`vllm complete`, against a server). Here the engine
runs in the command itself.
"""

import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from folovllm.entrypoints.commands.options import DebugOption, EngineOptions, SamplingOptions, with_options
from folovllm.entrypoints.commands.prompts import read_prompts
from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folovllm.entrypoints.llm import LLM
    from folovllm.outputs import LogprobsOnePosition, RequestOutput

DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 128}


@with_options
def generate(
    engine: EngineOptions,
    sampling: SamplingOptions,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to complete; - reads one from stdin.", show_default=False)
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="One prompt per line, or a .jsonl file; - is stdin.", show_default=False),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object per prompt and line.")] = False,
    debug: DebugOption = False,
) -> None:
    """Complete prompts. One is printed as it is generated; several run together.

    \b
      folovllm generate "The capital of France is"
      folovllm generate "One, two," "Red, green," --max-tokens 20
      folovllm generate --mine "Once upon a time"
      echo "Once upon a time" | folovllm generate - --temperature 0.8
      folovllm generate --prompts-file prompts.txt --json > answers.jsonl

    \b
    A line of a .jsonl file is {"prompt": "..."}, {"prompt_token_ids": [...]} or {"messages": [...]}.
    """
    found = read_prompts(prompts or [], prompts_file)
    sampling.sampling_params(**DEFAULTS)  # a wrong option is refused before the model is loaded
    llm = engine.load()
    params = sampling.sampling_params(**DEFAULTS | llm.sampling_defaults())
    found = _render_chats(llm, found)
    if len(found) == 1 and not json_lines:
        _stream(llm, found[0], params)
        return
    for number, output in enumerate(llm.generate(found, params, use_tqdm=sys.stderr.isatty()), start=1):
        typer.echo(to_json(output) if json_lines else _with_heading(output, f"[{number}/{len(found)}]"))


def _render_chats(llm: "LLM", prompts: list[Any]) -> list[Any]:
    """Conversations as prompts; everything is rendered before anything runs."""
    return [_render_chat(llm, index, prompt) for index, prompt in enumerate(prompts)]


def _render_chat(llm: "LLM", index: int, prompt: Any) -> Any:
    if not (isinstance(prompt, dict) and "messages" in prompt):
        return prompt
    try:
        return llm.chat_prompt(**prompt)
    except (ValueError, TypeError) as error:
        raise ValueError(f"prompt {index}: {error}") from None


def to_json(output: "RequestOutput") -> str:
    """All fields of a RequestOutput on one line. What JSON cannot hold (-inf of a masked token) becomes null."""
    return json.dumps(_finite(dataclasses.asdict(output)), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stream(llm: "LLM", prompt: Any, params: SamplingParams) -> None:
    logprobs: list[LogprobsOnePosition] = []
    num_tokens, reason = 0, None
    for output in llm.stream(prompt, params):
        completion = output.outputs[0]
        typer.echo(completion.text, nl=False)  # flushes, so it shows at once
        logprobs += completion.logprobs or []
        num_tokens, reason = num_tokens + len(completion.token_ids), completion.finish_reason
    typer.echo()
    typer.echo(_logprobs_text(logprobs), nl=False)
    if reason == "length" and sys.stderr.isatty():
        limit = "--max-tokens" if num_tokens == params.max_tokens else "--max-model-len"
        typer.secho(f"(ended after {num_tokens} tokens; {limit} sets the limit)", dim=True, err=True)


def _with_heading(output: "RequestOutput", number: str) -> str:
    completion = output.outputs[0]
    prompt = output.prompt_token_ids if output.prompt is None else output.prompt
    heading = typer.style(f"{number} {prompt}", bold=True)
    return f"{heading}\n{completion.text}\n{_logprobs_text(completion.logprobs or [])}"


def _logprobs_text(logprobs: "list[LogprobsOnePosition]") -> str:
    """A line per token: the one that was taken, then the likeliest. E.g. "' Paris' -0.41 | ' a' -2.30"."""
    return "".join(
        " | ".join(f"{entry.decoded_token!r} {entry.logprob:.2f}" for entry in position.values()) + "\n"
        for position in logprobs
    )
