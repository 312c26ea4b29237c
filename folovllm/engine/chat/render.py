"""From chat messages to prompt text: a template is chosen, and nothing of the conversation may get lost.

Milestone: M1. vLLM counterpart: vllm/entrypoints/chat_utils.py (`apply_hf_chat_template`).
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from folovllm.engine.chat.completeness import Loss, find_loss
from folovllm.engine.chat.messages import (
    ONE_PART,
    PARTS,
    TEXT,
    Dialect,
    Message,
    developer_as_system,
    in_dialect,
    map_text,
    may_be_null,
    normalize_messages,
    plain_data,
)
from folovllm.engine.chat.options import ChatOptions, check_variables, sort_keywords
from folovllm.engine.chat.template import ChatTemplate, choose_template, compile_template

logger = logging.getLogger(__name__)

FORMS = {  # chat_template_content_format -> the forms of content to try, vLLM's first
    "string": [(TEXT, TEXT)],
    "openai": [(PARTS, TEXT), (PARTS, PARTS), (ONE_PART, ONE_PART)],
}
_PYTHON = "'type': 'text'"  # part of a list of parts as Python prints it
_TAG = "CONTINUE_FINAL_MESSAGE "  # its space tells whether the template trims what it renders


def render_chat(
    templates: dict[str, str],
    special_tokens: dict[str, str],
    messages: Any,
    keywords: dict[str, Any],
    allow_fixed_text: bool,
) -> str:
    """The prompt for `messages`. Raises ValueError for messages that are malformed, refused or lost, TypeError for
    unknown keywords. `allow_fixed_text` lets a template through that reads no message's content at all.
    """
    conversation = normalize_messages(messages)
    options, variables = sort_keywords(keywords)
    template = compile_template(choose_template(templates, options.chat_template, options.tools is not None))
    if not template.knows_developer:
        conversation = list(map(developer_as_system, conversation))
    check_variables(variables, template.variables, nested=keywords.get("chat_template_kwargs") or ())
    given = plain_data("template variables", variables)
    variables = {**special_tokens, **_given_variables(options, template), **given}
    refusal: ValueError | None = None
    worst: Loss | None = None
    without_text: str | None = None  # a prompt that lacks only texts beside tool calls
    for dialect in _dialects(template, options.chat_template_content_format, conversation):
        render = partial(_render, template, variables, dialect)
        try:
            text = _continued(conversation, render) if options.continue_final_message else render(conversation)
        except ValueError as error:
            refusal = refusal or error
            continue
        loss = find_loss(conversation, render)
        if loss is None or (allow_fixed_text and not template.mentions_content):
            return text
        worst = worst or loss
        if loss.beside_calls and without_text is None:
            worst, without_text = loss, text
    return _incomplete(without_text, worst, refusal)


def _incomplete(without_text: str | None, worst: Loss | None, refusal: ValueError | None) -> str:
    """The prompt where every form of the messages loses something: a warning, or an error that says what is lost."""
    if without_text is not None and worst is not None:
        logger.warning("%s", worst.sentence)
        return without_text
    if worst is not None:
        raise ValueError(worst.sentence)
    assert refusal is not None
    raise refusal


def _render(template: ChatTemplate, variables: dict[str, Any], dialect: Dialect, conversation: list[Message]) -> str:
    text = template.render({**variables, "messages": [in_dialect(message, dialect) for message in conversation]})
    if dialect.content != TEXT and _PYTHON in text and not any(map(_mentions_python, conversation)):
        raise ValueError("the chat template prints a list of parts: pass chat_template_content_format='string'")
    return text


def _mentions_python(message: Message) -> bool:
    return any(_PYTHON in part["text"] for part in message["content"] or [])


def _dialects(template: ChatTemplate, content_format: str, conversation: list[Message]) -> Iterator[Dialect]:
    """The forms to try, vLLM's first. The others are for templates that drop or refuse that one.

    E.g. DeepSeek-V3's template renders tool calls only where the content `is none` and the arguments are text.
    """
    likely, other = ("openai", "string") if template.walks_parts else ("string", "openai")
    forms = FORMS[likely] + FORMS[other] if content_format == "auto" else FORMS[content_format]
    calls = any("tool_calls" in message for message in conversation)
    nulls = any(map(may_be_null, conversation))
    for json_arguments in (False, True)[: 1 + calls]:
        for content, tool_content in forms:
            for keep_null in (False, True)[: 1 + nulls]:
                yield Dialect(content, tool_content, keep_null, json_arguments)


def _given_variables(options: ChatOptions, template: ChatTemplate) -> dict[str, Any]:
    """What templates read besides the messages. Tools that the template ignores are worth a warning, no refusal."""
    for name in ("tools", "documents"):
        if getattr(options, name) and name not in template.variables:
            logger.warning("the chat template does not read %s: the model will not see them", name)
    return {
        "add_generation_prompt": options.add_generation_prompt,
        "tools": None if options.tools is None else plain_data("tools", [_schema(tool) for tool in options.tools]),
        "documents": None if options.documents is None else plain_data("documents", options.documents),
    }


def _schema(tool: Any) -> Any:
    """A Python function becomes its JSON schema; importing transformers for that takes seconds."""
    if not callable(tool):
        return tool
    from transformers.utils import get_json_schema

    return get_json_schema(tool)


def _continued(conversation: list[Message], render: Callable[[list[Message]], str]) -> str:
    """The prompt up to the end of the last message's text: a tag is rendered behind it, and all from there is cut off.

    If the template trims the text, the tag has lost its space, and the text before it is trimmed as well.
    """
    last = conversation[-1]
    if not last["content"]:
        raise ValueError(f"continue_final_message: messages[{len(conversation) - 1}] has no text to continue")
    end = len(last["content"]) - 1
    prompt = render([*conversation[:-1], map_text(last, lambda j, text: text + _TAG if j == end else text)])
    text, tag, rest = prompt.rpartition(_TAG.strip())
    if not tag:
        raise ValueError("continue_final_message: the chat template drops the end of the last message")
    return text if rest.startswith(" ") else text.rstrip()
