"""The keywords of a chat call, sorted: options with vLLM's names, and variables that the chat template reads.

Milestone: M1. vLLM counterpart: vllm/entrypoints/llm.py (`LLM.chat` has them as parameters) and
vllm/entrypoints/chat_utils.py (`resolve_chat_template_kwargs`).
"""

import logging
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Any

from folovllm.checks import check_bool
from folovllm.sampling_params import SamplingParams
from folovllm.utils import unknown_name_message

logger = logging.getLogger(__name__)

FORMATS = ("auto", "string", "openai")
SHOWN_NAMES = 5  # in one line of the log: a client of the server may invent thousands
RESERVED = ("chat_template", "chat_template_content_format", "chat_template_kwargs", "messages", "tokenize")


@dataclass(frozen=True)
class ChatOptions:
    """What shapes the prompt of a conversation, with vLLM's names and defaults."""

    add_generation_prompt: bool = True
    chat_template: str | None = None
    continue_final_message: bool = False
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    chat_template_content_format: str = "auto"

    def __post_init__(self) -> None:
        for name in ("tools", "documents"):
            if not isinstance(getattr(self, name) or [], (list, tuple)):
                kind = "functions or of JSON schemas" if name == "tools" else "dicts with 'title' and 'text'"
                raise ValueError(f"{name} must be a list of {kind}, got {getattr(self, name)!r}")
        for name in ("add_generation_prompt", "continue_final_message"):
            check_bool(name, getattr(self, name))
        if self.chat_template_content_format not in FORMATS:
            given = self.chat_template_content_format
            raise ValueError(f"chat_template_content_format must be one of {', '.join(FORMATS)}; got {given!r}")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message=True continues the last message and add_generation_prompt=True begins a new"
                " one: pass add_generation_prompt=False"
            )


OPTION_NAMES = tuple(field.name for field in fields(ChatOptions))
DEFAULTS = ChatOptions()


def sort_keywords(keywords: dict[str, Any]) -> tuple[ChatOptions, dict[str, Any]]:
    """The options, and all else as template variables.

    A keyword given directly wins over the same name in `chat_template_kwargs`, as in vLLM. A direct None, or an option
    at its default, counts as not given.
    """
    nested = keywords.get("chat_template_kwargs") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"chat_template_kwargs must be a dict like {{'enable_thinking': False}}, got {nested!r}")
    if reserved := [name for name in RESERVED if name in nested]:
        raise ValueError(f"chat_template_kwargs may not hold {reserved[0]!r}: give it to the call itself")
    direct = {
        name: value for name, value in keywords.items() if name != "chat_template_kwargs" and _is_given(name, value)
    }
    merged = {**nested, **direct}
    options = {name: merged.pop(name) for name in OPTION_NAMES if name in merged}
    return ChatOptions(**options), merged


def _is_given(name: str, value: Any) -> bool:
    return value is not None and (name not in OPTION_NAMES or value != getattr(DEFAULTS, name))


def check_variables(variables: dict[str, Any], readable: frozenset[str], nested: Container[str]) -> None:
    """Raises TypeError for a keyword that is no option and that the template does not read: it would change nothing.

    Programs send the same `chat_template_kwargs` to every model, so a name in there (`nested`) only gives a warning.
    """
    own = [*OPTION_NAMES, "chat_template_kwargs", "messages", "sampling_params", "use_tqdm"]
    known = [*own, *sorted(readable.difference(own))]
    unread = [name for name in variables if name not in readable]
    for name in unread:
        if name not in nested:
            raise TypeError(f"{unknown_keyword(name, known)} (the chat template does not read {name!r} either)")
    if unread:
        shown = ", ".join(repr(name[:80]) for name in unread[:SHOWN_NAMES]) + (", ..." if unread[SHOWN_NAMES:] else "")
        logger.warning("chat_template_kwargs: the chat template does not read %s, so it changes nothing", shown)


def unknown_keyword(name: str, known: list[str]) -> str:
    """One line that refuses the keyword: the nearest known one, or where a sampling parameter belongs."""
    if name in {field.name for field in fields(SamplingParams)}:
        return f"unknown keyword {name!r}: it is a sampling parameter, so pass SamplingParams({name}=...)"
    return unknown_name_message("keyword", name, known)
