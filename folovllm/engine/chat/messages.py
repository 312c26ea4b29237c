"""Chat messages in OpenAI's many spellings, brought into one form before a template sees them.

Milestone: M1. vLLM counterpart: vllm/entrypoints/chat_utils.py (`parse_chat_messages`, `_postprocess_messages`).
Left out: images, audio and video.

One difference is deliberate: vLLM replaces tool-call arguments that are no JSON object by `{}` with a warning; here
the message is refused, because the model would otherwise read a call that was never made.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

Message = dict[str, Any]
Part = dict[str, Any]

TEXT_FIELDS = {  # type of a content part -> the field that holds its text
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
EMPTY_ANSWER = {"role", "name", "refusal", "annotations"}  # OpenAI's fields of an answer that says nothing
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class Parts(list[Part]):
    """Content as a list of parts. Where a template prints it whole, its text appears, not Python's repr of a list."""

    def __str__(self) -> str:
        return join_text(self)


class Dialect(NamedTuple):
    """The form in which a template gets messages: `content` is one of TEXT, PARTS and ONE_PART."""

    content: str
    tool_content: str  # that of role "tool", which vLLM gives as text to either kind of template
    keep_null: bool = False  # content without text as None; otherwise "" or []
    json_arguments: bool = False  # the arguments of tool calls as JSON text instead of an object


TEXT, PARTS, ONE_PART = "text", "parts", "one part"


def join_text(parts: list[Part]) -> str:
    """The text of a message for a template that wants a string: parts on lines of their own, as in vLLM."""
    return "\n".join(part["text"] for part in parts if part["text"])


def normalize_messages(messages: Any) -> list[Message]:
    """Messages as plain data with `content` a list of text parts, or None. Raises a ValueError that names messages[i].

    E.g. the content "Hi" becomes [{"type": "text", "text": "Hi"}].
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            "messages must be a non-empty list like [{'role': 'user', 'content': 'Hello'}], "
            f"got {'an empty list' if messages in ([], ()) else type(messages).__name__}"
        )
    checked = [_checked(f"messages[{index}]", message) for index, message in enumerate(messages)]
    plain = plain_data("messages", checked)
    return [_normalize(f"messages[{index}]", message) for index, message in enumerate(plain)]


def developer_as_system(message: Message) -> Message:
    """OpenAI's newer name of the system message, for a template that does not know it. Its model does not, either."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


def in_dialect(message: Message, dialect: Dialect) -> Message:
    """The message in the form that `dialect` names."""
    if dialect.json_arguments and "tool_calls" in message:
        message = {**message, "tool_calls": [map_arguments(call, _to_json) for call in message["tool_calls"]]}
    parts: list[Part] = message["content"] or []
    if dialect.keep_null and may_be_null(message):
        return {**message, "content": None}
    form = dialect.tool_content if message["role"] == "tool" else dialect.content
    if form == ONE_PART:
        parts = [{"type": "text", "text": join_text(parts)}]
    return {**message, "content": join_text(parts) if form == TEXT else Parts(parts)}


def may_be_null(message: Message) -> bool:
    """Clients write null, "" or nothing for the content of a message that only calls tools."""
    return message["content"] is None or ("tool_calls" in message and not join_text(message["content"]))


def map_arguments(call: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The tool call with `change(arguments)` as its arguments; the call stands under "function" or by itself."""
    function = call.get("function", call)
    function = {**function, "arguments": change(function["arguments"])}
    return {**call, "function": function} if "function" in call else function


def _to_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def map_text(message: Message, change: Callable[[int, str], str]) -> Message:
    """The message with `change(j, text)` in place of the text of each part j."""
    parts = message["content"] or []
    changed = [{**part, "text": change(j, part["text"])} for j, part in enumerate(parts)]
    return {**message, "content": None if message["content"] is None else changed}


def plain_data(what: str, value: Any) -> Any:
    """A copy that holds only what JSON holds: a template is code from the internet and gets no live objects."""
    try:
        return json.loads(json.dumps(value, default=_dumped))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} may hold only strings, numbers, lists and dicts: {error}") from None


def _dumped(value: Any) -> Any:
    """An object of the openai package, of which users append answers and tool calls to their messages."""
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump(exclude_none=True)
    raise TypeError(f"{type(value).__name__} is not one of them")


def _checked(where: str, message: Any) -> Message:
    """The message if it is a dict with a role; an object of the openai package becomes one."""
    message = _dumped(message) if callable(getattr(message, "model_dump", None)) else message
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {type(message).__name__}: {message!r}")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} needs a 'role' that is a string, such as 'user', got {message.get('role')!r}")
    return message


def _normalize(where: str, message: Message) -> Message:
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "audio" in message:
        raise ValueError(f"{where}.audio: this engine serves text models only; send the transcript as 'content'")
    if message["role"] == "assistant":
        message = _normalize_assistant(message)
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", calls)
    if not _may_lack_content(message):
        raise ValueError(f"{where} needs a 'content' that is a string, got None (or a list of text parts)")
    return {**message, "content": _content_parts(where, message.get("content"))}


def _may_lack_content(message: Message) -> bool:
    """An answer without text is dumped as {"role": "assistant"}; elsewhere the word "content" may be misspelled."""
    empty_answer = message["role"] == "assistant" and message.keys() <= EMPTY_ANSWER
    return empty_answer or not message.keys().isdisjoint({"content", "tool_calls", *REASONING_FIELDS})


def _normalize_assistant(message: Message) -> Message:
    """Calls under their present name, reasoning under all its names, a refusal as the text it is."""
    message = dict(message)
    if (call := message.pop("function_call", None)) and "tool_calls" not in message:  # OpenAI's first spelling
        message["tool_calls"] = [{"type": "function", "function": call}]
    if message.get("content") is None and isinstance(message.get("refusal"), str):
        message["content"] = message.pop("refusal")
    reasoning = next((message[field] for field in REASONING_FIELDS if message.get(field)), None)
    if reasoning is not None:
        message = {**dict.fromkeys(REASONING_FIELDS, reasoning), **message}
    return message


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ValueError(f"{where} must be a list of calls, got {type(calls).__name__}")
    return [_tool_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    """A call {"type": "function", "function": {"name", "arguments"}}, or only what stands under "function"."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        form = "{'type': 'function', 'function': {'name': '...', 'arguments': {...}}}"
        raise ValueError(f"{where} must be like {form}, got {call!r}")
    function = {**function, "arguments": _arguments(where, function.get("arguments"))}
    return {**call, "function": function} if "function" in call else function


def _arguments(where: str, arguments: Any) -> dict[str, Any]:
    """OpenAI's clients send the arguments as JSON text, and templates count on an object; no text means no arguments.

    E.g. '{"city": "Oslo"}' -> {"city": "Oslo"}; "", None and "null" -> {}.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments.strip() or "null")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: the arguments are not valid JSON ({error}): {arguments[:80]!r}") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: the arguments must be an object like {{'city': 'Oslo'}}, got {arguments!r}")
    return arguments


def _content_parts(where: str, content: Any) -> list[Part] | None:
    if content is None:
        return None
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        raise ValueError(f"{where} needs a 'content' that is a string, got {content!r} (or a list of text parts)")
    parts = [_text_part(f"{where}.content[{index}]", part) for index, part in enumerate(content)]
    return [part for part in parts if part["text"] is not None]


def _text_part(where: str, part: Any) -> Part:
    """One part as {"type": "text", "text": ...}; fields beyond OpenAI's, such as `cache_control`, are kept."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    field = TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
    if field is None or not isinstance(part.get(field, 0), (str, type(None))):
        named = f"is of type {kind!r} and this engine serves text models only" if field is None and kind else "is wrong"
        raise ValueError(f"{where} {named}: content parts must be {{'type': 'text', 'text': '...'}}, got {part!r}")
    more = {key: value for key, value in part.items() if key not in ("type", "text", field, "closed")}
    return {"type": "text", "text": part[field], **more}
