"""Finds what a chat template drops. A message that would vanish from the prompt is refused instead.

Milestone: M1. vLLM counterpart: none; vLLM and transformers render what the template renders.

Searching the prompt for a message's text would not do: templates trim, escape and strip it, and a short text occurs in
the prompt by chance. So the conversation is rendered once more with a mark at the end of every text and in every tool
call, and a part whose mark does not come out is lost. Two more tries are for templates that show only some of a text:
marks at the beginning, because a template may cut off the end; then two other texts in its place, because a template
may break a mark in two (it wraps lines) or have no room for one (it truncates). If both give the same prompt, nothing
of the text is shown. Earlier reasoning is not checked: models are trained without it.
"""

import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from folovllm.engine.chat.messages import Message, map_arguments, map_text

Unit = tuple[int, str, int]  # E.g. (2, "content", 0): the first part of messages[2]
Render = Callable[[list[Message]], str]


class Loss(NamedTuple):
    """What a template drops. `beside_calls`: only texts that stand beside tool calls, and the calls are rendered.

    The templates of Llama 3.1, Mistral and gpt-oss do that on purpose: their models never saw such a text.
    """

    sentence: str
    beside_calls: bool


def find_loss(messages: list[Message], render: Render) -> Loss | None:
    """The first part of the conversation that `render` drops, the worst kind first. None if nothing is lost."""
    lost = list(_units(messages))
    word = secrets.token_hex(8)  # as good as certain not to occur in the conversation
    try:
        for at_end in (True, False):
            prompt = render([_marked(message, index, word, at_end) for index, message in enumerate(messages)])
            found = set(re.findall(f"{word}x([0-9]+x[a-z]+x[0-9]+)x", prompt.lower()))
            lost = [unit for unit in lost if _label(unit) not in found]
            if not lost:
                return None
        lost = [unit for unit in lost if unit[1] == "calls" or _leaves_no_trace(messages, unit, render)]
    except ValueError:
        return None  # the template checks what the texts say: no mark can be put in
    serious = [unit for unit in lost if not _stands_beside_calls(messages, unit, lost)]
    return Loss(_describe(messages, (serious or lost)[0]), not serious) if lost else None


def _leaves_no_trace(messages: list[Message], unit: Unit, render: Render) -> bool:
    """Whether the prompt stays the same if another text of the same length takes the place of this one."""
    index, _, number = unit

    def prompt(letter: str) -> str:
        other = map_text(messages[index], lambda j, text: letter * len(text) if j == number else text)
        return render([*messages[:index], other, *messages[index + 1 :]])

    return prompt("q") == prompt("z")


def _stands_beside_calls(messages: list[Message], unit: Unit, lost: list[Unit]) -> bool:
    index, field, _ = unit
    calls_are_shown = not any((i, f) == (index, "calls") for i, f, _ in lost)
    return field == "content" and bool(messages[index].get("tool_calls")) and calls_are_shown


def _units(messages: list[Message]) -> Iterator[Unit]:
    """What must come out: each part with some text, each tool call."""
    for index, message in enumerate(messages):
        for j, part in enumerate(message["content"] or []):
            if part["text"].strip():
                yield index, "content", j
        for k in range(len(message.get("tool_calls", ()))):
            yield index, "calls", k


def _label(unit: Unit) -> str:
    """E.g. (2, "content", 0) -> "2xcontentx0": nothing that a template would escape or split at."""
    return "x".join(map(str, unit))


def _marked(message: Message, index: int, word: str, at_end: bool) -> Message:
    def mark(j: int, text: str) -> str:
        label = f"{word}x{_label((index, 'content', j))}x"
        return text if not text.strip() else text + label if at_end else label + text

    marked = map_text(message, mark)
    if calls := message.get("tool_calls"):
        labels = [f"{word}x{_label((index, 'calls', k))}x" for k in range(len(calls))]
        marked["tool_calls"] = [_marked_call(*pair, at_end) for pair in zip(calls, labels, strict=True)]
    return marked


def _marked_call(call: dict[str, Any], label: str, at_end: bool) -> dict[str, Any]:
    """The mark is in the name and an argument more, or takes the place of every value: a template that renders any of
    them renders the call.
    """
    call = map_arguments(call, lambda given: {**(given if at_end else dict.fromkeys(given, label)), label: label})
    if "function" in call:
        return {**call, "function": {**call["function"], "name": call["function"]["name"] + label}}
    return {**call, "name": call["name"] + label}


def _describe(messages: list[Message], unit: Unit) -> str:
    index, field, number = unit
    several = len(messages[index]["content"] or []) > 1
    where = f"tool_calls[{number}]" if field == "calls" else f"content[{number}]" if several else "content"
    return (
        f"the chat template renders no part of messages[{index}].{where} (role {messages[index]['role']!r}), so the"
        " model would not see it: leave it out, use a role that the template knows, or pass a chat_template= that"
        " renders it"
    )
