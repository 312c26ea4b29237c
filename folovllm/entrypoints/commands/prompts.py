"""The prompts of `folovllm generate`: from the command line, from stdin, from a text file or a JSONL file.

Milestone: M1. vLLM counterpart: vllm/entrypoints/openai/run_batch.py reads JSONL, in OpenAI's batch format.

    prompts.txt     one prompt per line; blank lines are left out
    prompts.jsonl   one object per line: {"prompt": "..."}, {"prompt_token_ids": [1, 2]} or {"messages": [...]}
"""

import json
from pathlib import Path
from typing import Any

import typer

from folovllm.engine.chat.messages import normalize_messages
from folovllm.sampling_params import SamplingParams
from folovllm.text_files import read_stdin, read_text_file, split_lines

FORMS = "{'prompt': '...'}, {'prompt_token_ids': [...]} or {'messages': [...]}"
CHAT_KEYS = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_content_format",
    "chat_template_kwargs",
)


def read_prompts(prompts: list[str], prompts_file: str | None) -> list[Any]:
    """The prompts of the command line, then those of the file: texts, and dicts from a JSONL file.

    Raises ValueError if there is no prompt, and for a bad line of the file, with its number.
    """
    if [*prompts, prompts_file].count("-") > 1:
        raise ValueError("stdin ('-') can be read only once")
    found: list[Any] = [read_stdin().rstrip("\r\n") if prompt == "-" else prompt for prompt in prompts]
    if prompts_file is not None:
        found += _read_file(prompts_file)
    if not found:
        raise ValueError("no prompt: give one or more texts, - for stdin, or --prompts-file FILE")
    return found


def _read_file(name: str) -> list[Any]:
    try:
        lines = split_lines(read_stdin() if name == "-" else read_text_file(name))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file {name}: {error}; give a text file with one prompt per line") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if Path(name).suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(f"{name}, line {number}", line) for number, line in numbered]


def _prompt_of(where: str, line: str) -> Any:
    """The prompt of a JSONL line: a text, or a dict with `prompt_token_ids` or `messages`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter: brackets nested thousands deep
        raise ValueError(f"{where}: not valid JSON ({error}); each line must be like {FORMS}") from None
    kinds = [key for key in ("prompt", "prompt_token_ids", "messages") if isinstance(record, dict) and key in record]
    if len(kinds) != 1:
        raise ValueError(f"{where}: must be one of {FORMS}, got {line[:80]}")
    value = record[kinds[0]]
    _check_keys(where, record, CHAT_KEYS if kinds == ["messages"] else kinds)
    if kinds == ["messages"]:
        _check_messages(where, value)
        return {key: record[key] for key in CHAT_KEYS if key in record}
    if kinds == ["prompt"] and isinstance(value, str) and value:
        return value
    if kinds == ["prompt_token_ids"] and isinstance(value, list) and value and all(type(i) is int for i in value):
        return {"prompt_token_ids": value}
    kind = "a text that is not empty" if kinds == ["prompt"] else "a list of integers that is not empty"
    raise ValueError(f"{where}: {kinds[0]!r} must be {kind}, got {line[:80]}")


def _check_keys(where: str, record: dict[str, Any], known: tuple[str, ...] | list[str]) -> None:
    """A sampling parameter in the file is refused, for it would have no effect; other keys are named and left out."""
    ignored = [key for key in record if key not in known]
    if wrong := [key for key in ignored if key in SamplingParams.__dataclass_fields__]:
        raise ValueError(f"{where}: {wrong[0]!r} cannot be set for one prompt; give it as an option of the command")
    if ignored:
        typer.secho(f"{where}: not used: {', '.join(ignored)}", dim=True, err=True)


def _check_messages(where: str, messages: Any) -> None:
    try:
        normalize_messages(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
