"""Chat messages: every form of OpenAI's comes out as vLLM normalises it, and what cannot be served is refused."""

import json
from typing import Any

import pytest

from folovllm.engine.chat.messages import normalize_messages
from tests.m1.chat_templates import each, walk
from tests.m1.tiny_tokenizers import byte_level

pytestmark = pytest.mark.m1

SHOW = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
WALK = each("[{{ m.role }}|{% for p in m.content %}{% if p.type == 'text' %}<{{ p.text }}>{% endif %}{% endfor %}]")
ARGUMENTS = each("{% for t in m.tool_calls or [] %}{{ t.function.arguments | tojson }};{% endfor %}")


def render(messages: Any, template: str, **keywords: Any) -> str:
    return byte_level().apply_chat_template(messages, chat_template=template, **keywords)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def calling(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "mul", "arguments": arguments}}
    return [{"role": "user", "content": "3 * 18?"}, {"role": "assistant", "content": "", "tool_calls": [call]} | more]


# --- content ------------------------------------------------------------------------------------------------------

CONTENTS: list[tuple[Any, str, str]] = [  # content -> what a text template shows, what a template of parts shows
    ("a", "a", "<a>"),
    ([], "", ""),
    ([{"type": "text", "text": "a"}], "a", "<a>"),
    ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb", "<a><b>"),
    (["a", "b"], "a\nb", "<a><b>"),
    (["a", {"type": "text", "text": "b"}], "a\nb", "<a><b>"),
    ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb", "<a><b>"),
    (
        [{"type": "refusal", "refusal": "no"}, {"type": "thinking", "thinking": "hm", "closed": True}],
        "no\nhm",
        "<no><hm>",
    ),
    ([{"type": "text", "text": "a"}, {"type": "text", "text": None}], "a", "<a>"),
    ([{"type": "text", "text": "a"}, {"type": "text", "text": ""}, "b"], "a\nb", "<a><><b>"),
    (({"type": "text", "text": "a"},), "a", "<a>"),
    (None, "", ""),
]


@pytest.mark.parametrize(("content", "text", "parts"), CONTENTS)
def test_content_in_both_formats(content: Any, text: str, parts: str) -> None:
    """vllm-project/vllm issue 9294: a template that walks parts gets parts, another one text joined by newlines."""
    assert render(user(content), SHOW) == f"[user|{text}]"
    assert render(user(content), WALK) == f"[user|{parts}]"


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_null_content_is_empty_text(role: str) -> None:
    """Not the text "None" (vllm-project/vllm issue 10244 shows what templates make of it)."""
    messages = [*user("x"), {"role": role, "content": None}]
    assert render(messages, SHOW) == f"[user|x][{role}|]"
    assert render(messages, WALK) == f"[user|<x>][{role}|]"


def test_the_format_may_be_forced() -> None:
    both = "{% if messages[0].content is string %}text{% else %}parts{% endif %}: {{ messages[0].content }}"
    assert render(user("a"), both) == "text: a"
    assert render(user("a"), both, chat_template_content_format="openai") == "parts: a"
    both = "{% for p in messages[0].content if messages[0].content is not string %}{{ p.text }}{% endfor %}" + both
    assert render(user("a"), both) == "aparts: a"
    assert render(user("a"), both, chat_template_content_format="string") == "text: a"
    with pytest.raises(ValueError, match="must be one of auto, string, openai; got 'list'"):
        render(user("a"), both, chat_template_content_format="list")


def test_a_list_printed_whole_is_its_text() -> None:
    """Not Python's repr, which templates that treat the system prompt as text would show."""
    template = "{{ messages[0].content | trim }};" + each(walk("m.content"), "messages[1:]")
    messages = [{"role": "system", "content": " s "}, *user("a")]
    assert render(messages, template) == "s;a"


def test_fields_of_parts_and_messages_reach_the_template() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    assert render(user([part]), WALK + "{{ messages[0].content[0].cache_control.type }}").endswith("ephemeral")
    messages = [{"role": "tool", "content": "x", "tool_call_id": "7", "name": "f"}]
    assert render(messages, "{{ messages[0].tool_call_id ~ messages[0].name ~ messages[0].content }}") == "7fx"
    developer = {"role": "developer", "content": "d", "tools": [{"name": "t"}]}
    template = (
        "{% set m = messages[0] %}{% if m.role == 'developer' %}{{ m.role ~ m.content ~ m.tools[0].name }}{% endif %}"
    )
    assert render([developer], template) == "developerdt"


def test_a_developer_is_the_system_to_a_template_that_does_not_know_the_name() -> None:
    """As in vLLM 0.32. Else a template with a default system message would add it before the client's own."""
    messages = [{"role": "developer", "content": "Be brief."}, *user("Hi")]
    assert render(messages, SHOW) == "[system|Be brief.][user|Hi]"
    known = SHOW + "{# developer #}{{ 'developer' if false }}"
    assert render(messages, known) == "[developer|Be brief.][user|Hi]"
    assert messages[0]["role"] == "developer"  # the client's own data stay as they are


def test_tool_results_are_text_for_either_template() -> None:
    """As in vLLM; only a template that walks the parts of tool messages too gets them as parts."""
    result = {"role": "tool", "content": ["1", "2"]}
    special = each("{% if m.role == 'tool' %}{{ m.content }}{% else %}" + walk("m.content") + "{% endif %}")
    assert render([*user("a"), result], special) == "a1\n2"
    assert render([*user("a"), result], WALK) == "[user|<a>][tool|<1><2>]"


# --- tool calls, reasoning, refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 3, "b": [1, {"c": null}]}', {"a": 3, "b": [1, {"c": None}]}),
        ({"a": 3}, {"a": 3}),
        ('{"city": "Zürich"}', {"city": "Zürich"}),
        (' {"a": 3}\n', {"a": 3}),
        ("{}", {}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ("null", {}),
    ],
)
def test_arguments_reach_the_template_as_an_object(arguments: Any, expected: dict[str, Any]) -> None:
    """QwenLM/Qwen3-Coder issue 444: OpenAI's clients send them as JSON text; vllm issue 43851: some send "null"."""
    assert render(calling(arguments), ARGUMENTS) == json.dumps(expected, ensure_ascii=False) + ";"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"a": ', r"messages\[1\].tool_calls\[0\]: the arguments are not valid JSON .*'\{\"a\": '"),
        ("[" * 100_000, "the arguments are not valid JSON"),
        ("a=3", r"messages\[1\].tool_calls\[0\]: the arguments are not valid JSON"),
        ("[1, 2]", r"messages\[1\].tool_calls\[0\]: the arguments must be an object .*got \[1, 2\]"),
        ('"text"', "the arguments must be an object .*got 'text'"),
        ([1], r"the arguments must be an object .*got \[1\]"),
        (5, "the arguments must be an object .*got 5"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(calling(arguments), ARGUMENTS)


def test_other_forms_of_calls() -> None:
    call = {"name": "mul", "arguments": "{}"}
    show = each("{{ m.content }}{% for t in m.tool_calls or [] %}{{ t | tojson }}{% endfor %}")
    assert (
        render([{"role": "assistant", "content": "c", "tool_calls": [call]}], show)
        == 'c{"name": "mul", "arguments": {}}'
    )
    old = {"role": "assistant", "content": None, "function_call": call}
    assert render([old], show) == '{"type": "function", "function": {"name": "mul", "arguments": {}}}'
    for calls in (None, []):
        assert "tool_calls" not in normalize_messages(calling("{}", tool_calls=calls))[1]


def test_calls_of_other_roles_are_normalised_too() -> None:
    messages = [{"role": "model", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 3}'}}]}]
    assert render(messages, each("{{ m.content }}") + ARGUMENTS) == 'a{"a": 3};'


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = calling('{"a": 3}')
    before = json.dumps(messages)
    render(messages, ARGUMENTS)
    assert json.dumps(messages) == before


@pytest.mark.parametrize("given", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("read", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_found_under_each_of_its_names(given: str, read: str) -> None:
    messages = [{"role": "assistant", "content": "a", given: "hm"}]
    assert render(messages, "{{ messages[0]." + read + " }}:{{ messages[0].content }}") == "hm:a"


def test_a_refusal_is_text() -> None:
    assert render([*user("x"), {"role": "assistant", "content": None, "refusal": "I won't"}], SHOW).endswith(
        "|I won't]"
    )


class FromOpenAI:
    """In the manner of the openai package's objects, of which users append answers to their messages."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self, exclude_none: bool) -> dict[str, Any]:
        return self.fields | ({} if exclude_none else {"audio": None})


def test_objects_of_the_openai_package() -> None:
    answer = FromOpenAI(role="assistant", content="hi")
    assert render([*user("x"), answer], SHOW) == "[user|x][assistant|hi]"
    call = FromOpenAI(id="1", type="function", function=FromOpenAI(name="mul", arguments='{"a": 3}'))
    assert render([{"role": "assistant", "content": None, "tool_calls": [call]}], ARGUMENTS) == '{"a": 3};'


def test_an_answer_without_text_may_lack_content() -> None:
    """The openai package's `model_dump(exclude_none=True)` leaves a null content out, so vLLM takes such messages."""
    answer = FromOpenAI(role="assistant", refusal=None, annotations=[])
    for empty in ({"role": "assistant"}, {"role": "assistant", "name": "Bob"}, answer):
        assert render([*user("x"), empty, *user("y")], SHOW) == "[user|x][assistant|][user|y]"


def test_reasoning_may_stand_alone() -> None:
    """An answer that was cut off while the model was still thinking."""
    assert render([{"role": "assistant", "reasoning": "hm"}], "{{ messages[0].reasoning_content }}") == "hm"


REFUSED: list[tuple[Any, str]] = [
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        r"messages\[0\].content\[0\] is of type 'image_url'.*text models only",
    ),
    (
        {"role": "user", "content": ["a", {"type": "input_audio"}]},
        r"messages\[0\].content\[1\] is of type 'input_audio'",
    ),
    ({"role": "user", "content": [{"text": "a"}]}, r"content parts must be .*got \{'text': 'a'\}"),
    (
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        r"messages\[0\].content\[0\] is wrong: content parts must be",
    ),
    ({"role": "user", "content": [{"type": "text", "txt": "a"}]}, "content parts must be"),
    ({"role": "user", "content": [{"type": ["text"]}]}, "content parts must be"),
    ({"role": "user", "content": [5]}, "content parts must be"),
    ({"role": "user", "content": {"type": "text", "text": "a"}}, "needs a 'content' that is a string"),
    ({"role": "user", "contents": "a"}, r"messages\[0\] needs a 'content'"),
    ({"role": "system"}, r"messages\[0\] needs a 'content'"),
    ({"role": "assistant", "contents": "a"}, r"messages\[0\] needs a 'content'"),
    ({"role": "assistant", "content": "a", "audio": {"id": "1"}}, r"messages\[0\].audio: .*text models only"),
    ({"role": "assistant", "content": "a", "tool_calls": "f()"}, r"messages\[0\].tool_calls must be a list"),
    ({"role": "assistant", "content": "a", "tool_calls": ["f()"]}, r"messages\[0\].tool_calls\[0\] must be like"),
    (
        {"role": "assistant", "content": "a", "tool_calls": [{"type": "custom", "custom": {}}]},
        "must be like .*'custom'",
    ),
]


@pytest.mark.parametrize(("message", "error"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name(message: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        render([message], SHOW)
