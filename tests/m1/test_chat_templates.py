"""Chat templates: which one is used, which form of content it wants, and that nothing of a conversation gets lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.chat.template import compile_template
from folovllm.engine.tokenizer import Tokenizer
from tests.m1.chat_templates import FAMILIES, QWEN3, WITH_TOOLS, each, macro, walk
from tests.m1.tiny_tokenizers import EOS, byte_level

pytestmark = pytest.mark.m1

USER = [{"role": "user", "content": "Hi there"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(messages: Any, template: str, **keywords: Any) -> str:
    return byte_level().apply_chat_template(messages, chat_template=template, **keywords)


# --- does it walk parts? ------------------------------------------------------------------------------------------

WALKERS = {  # every spelling of a loop over the parts of a message
    "item": each(walk("m['content']")),
    "attribute": each(walk("m.content")),
    "get": each(walk("m.get('content')")),
    "alias of content": each("{% set c = m.content %}" + walk("c")),
    "alias of an alias": each("{% set c = m.content %}{% set d = c %}" + walk("d")),
    "slice": "{% set rest = messages[0:] %}" + each(walk("m.content"), "rest"),
    "filter": each(walk("m.content | selectattr('type', 'equalto', 'text')"), "messages | list"),
    "filtered alias": "{% set ms = messages | rejectattr('role', 'equalto', 'x') | list %}"
    + each(walk("m.content"), "ms"),
    "index": "{% for i in range(messages | length) %}" + walk("messages[i].content") + "{% endfor %}",
    "first message": "{% set first = messages[0] %}" + walk("first.content"),
    "first filter": walk("(messages | first).content"),
    "or": each(walk("m.content or []")),
    "condition": each(walk("(m.content if m.role == 'user' else [])")),
    "with": each("{% with c = m.content %}" + walk("c") + "{% endwith %}"),
    "namespace": "{% set ns = namespace(c=none) %}" + each("{% set ns.c = m.content %}" + walk("ns.c")),
    "macro of content": macro("c", walk("c"), each("{{ show(m.content) }}")),
    "macro of a message": macro("m", walk("m.content"), each("{{ show(m) }}")),
    "macro by keyword": macro("x, c", walk("c"), each("{{ show(1, c=m.content) }}")),
    "macro of the messages": macro("ms", each(walk("m.content"), "ms"), "{{ show(messages) }}"),
    "generation": each("{% generation %}" + walk("m.content") + "{% endgeneration %}"),
}
NO_WALKERS = {
    "text": each("{{ m.content }}"),
    "lines": each("{% for line in m.content.split('\n') %}{{ line }}{% endfor %}"),
    "calls": each("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.name }}{% endfor %}"),
    "other loop": "{% for d in documents or [] %}" + walk("d.content") + "{% endfor %}{{ messages[0].content }}",
}


@pytest.mark.parametrize("name", WALKERS)
def test_a_loop_over_parts_is_found_however_it_is_written(name: str) -> None:
    """vllm-project/vllm pull 9358 reads the syntax tree. Parts and a string give the same prompt, no text is lost."""
    template = WALKERS[name]
    assert compile_template(template).walks_parts
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]}]
    assert render(parts, template) == render([{"role": "user", "content": "Hello world"}], template) == "Hello world"


@pytest.mark.parametrize("name", NO_WALKERS)
def test_other_loops_are_not_mistaken_for_it(name: str) -> None:
    assert not compile_template(NO_WALKERS[name]).walks_parts
    assert render(USER, NO_WALKERS[name]) == "Hi there"


# --- nothing is lost ----------------------------------------------------------------------------------------------

CALL = {
    "role": "assistant",
    "content": "Let me see",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "content": "42"}
LOSSES: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "a role it skips": (
        [{"role": "system", "content": "Be brief"}, *USER],
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        r"renders no part of messages\[0\].content \(role 'system'\)",
    ),
    "a text that occurs in the template": (
        [*USER, {"role": "tool", "content": "a"}],
        "{% for m in messages if m.role == 'user' %}a {{ m.content }} a{% endfor %}",
        r"messages\[1\].content \(role 'tool'\)",
    ),
    "the same text in another message": (
        [*USER, RESULT | {"content": "Hi there"}],
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        r"messages\[1\].content",
    ),
    "tool calls": ([*USER, CALL], each("{{ m.content }}"), r"messages\[1\].tool_calls\[0\]"),
    "the second call": (
        [*USER, CALL | {"tool_calls": CALL["tool_calls"] * 2}],
        each("{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"),
        r"messages\[1\].tool_calls\[1\]",
    ),
    "all but the last": ([*USER, *USER], "{{ messages[-1].content }}", r"messages\[0\].content"),
    "all but its length": (USER, each("{{ m.content | length }}"), r"messages\[0\].content"),
    "everything": (USER, each("{% if m.content is undefined %}{{ m.content }}{% endif %}"), r"messages\[0\]"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_message_that_would_vanish_is_refused(what: str) -> None:
    messages, template, error = LOSSES[what]
    with pytest.raises(ValueError, match=error):
        render(messages, template)


KEPT: dict[str, tuple[str, str]] = {  # a text and a template that does something to it
    "trims": ("  a \n", "{{ messages[0].content | trim }}"),
    "escapes": ('say "é" & <b>', "{{ messages[0].content | tojson }}{{ messages[0].content | e }}"),
    "dumps": ("a", "{{ messages | tojson }}"),
    "raises the case": ("abc", "{{ messages[0].content | upper }}"),
    "keeps the first line": ("a\nb", "{{ messages[0].content.split('\n')[0] }}"),
    "truncates": ("a text that is longer than the room for it", "{{ messages[0].content[:10] }}"),
    "wraps lines": ("several words " * 9, "{{ messages[0].content | wordwrap(20) }}"),
    "keeps the first word": ("several words", "{{ messages[0].content.split() | first | truncate(9) }}"),
    "keeps the last line": ("a\nb", "{{ messages[0].content.split('\n')[-1] }}"),
    "drops reasoning": ("<think>\na\n</think>", "{{ messages[0].content.split('</think>')[-1] }}"),
    "letter by letter": ("abc", "{% for c in messages[0].content.replace('y', '') %}{{ c }}{% endfor %}"),
    "only spaces": (" \n", "{{ messages[0].content | trim }}"),
    "one part by index": ("abc", "{{ messages[0].content[0].text }}"),
    "code that looks like parts": ("[{'type': 'text'}]", "{% for p in messages[0].content %}{{ p.text }}{% endfor %}"),
    "checks the text": (
        "yes",
        each("{% if m.content != 'yes' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"),
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_a_template_may_change_the_text(what: str) -> None:
    text, template = KEPT[what]
    render([{"role": "user", "content": text}], template)


@pytest.mark.parametrize("shown", ["name", "arguments | tojson", "arguments.a", "arguments.items() | list", "id"])
def test_a_call_is_kept_if_any_of_it_is_shown(shown: str) -> None:
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [*USER, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    template = each("{{ m.content }}{% for t in m.tool_calls or [] %}{{ " + f"t.function.{shown}" + " }}{% endfor %}")
    if shown == "id":  # there is none in the function, so nothing of it is shown
        with pytest.raises(ValueError, match=r"messages\[1\].tool_calls\[0\]"):
            render(messages, template)
        return
    assert len(render(messages, template)) > len("Hi thereb")


CALLS_ONLY = each("{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}")


def test_text_beside_tool_calls_may_be_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """meta-llama/Llama-3.1-8B-Instruct: beside calls, its template leaves the text out (huggingface/transformers issue
    45419 compares what templates make of such messages), and vLLM renders that.
    """
    assert render([*USER, CALL, RESULT], CALLS_ONLY) == "Hi theref42"
    assert "renders no part of messages[1].content (role 'assistant')" in caplog.text


def test_text_beside_tool_calls_is_kept_if_some_form_of_it_is_rendered(caplog: pytest.LogCaptureFixture) -> None:
    """DeepSeek-V3's template shows calls only beside null content; a form that shows both comes first."""
    shows_parts = CALLS_ONLY.replace(".name }}", ".name }}{% if m.content is not string %}{{ m.content }}{% endif %}")
    assert render([*USER, CALL], shows_parts) == "Hi therefLet me see"
    assert not caplog.records


def test_text_beside_tool_calls_excuses_no_other_loss() -> None:
    two_calls = CALL | {"tool_calls": CALL["tool_calls"] * 2}
    with pytest.raises(ValueError, match=r"renders no part of messages\[1\]"):
        render([*USER, two_calls], CALLS_ONLY)
    with pytest.raises(ValueError, match=r"messages\[2\].content \(role 'tool'\)"):
        render([*USER, CALL, RESULT], CALLS_ONLY.replace("{% else %}", "{% elif m.role == 'user' %}"))


def test_a_loss_is_named_rather_than_the_failure_of_another_form() -> None:
    """mistralai/Mistral-Nemo-Instruct-2407: the template adds texts and cannot add lists, which are tried as well."""
    adds = "{% for m in messages %}{% for x in m.content %}{% endfor %}{% endfor %}{{ 'a' + messages[-1].content }}"
    with pytest.raises(ValueError, match=r"renders no part of messages\[0\].content"):
        render([{"role": "system", "content": "Be brief"}, *USER], adds)


def test_parts_are_never_shown_as_python_code() -> None:
    """A template that slices the content and prints the slice gets text, even where it also walks parts."""
    sliced = "{{ messages[0].content[:60] }}" + each(walk("m.content"), "messages[1:]")
    with pytest.raises(ValueError, match=r"prints a list of parts|messages\[1\].content"):
        render([*USER, *USER], sliced)
    assert render(USER, sliced) == "Hi there"


def test_parts_become_one_for_a_template_that_reads_only_the_first() -> None:
    messages = [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]
    assert render(messages, "{{ messages[0].content[0].text }}") == "a\nb"


def test_llm_refuses_a_template_that_reads_no_content_at_all() -> None:
    """The tokenizer renders such a template, as transformers does; a conversation with a model it cannot be."""
    template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert render(USER, template) == "user"
    with pytest.raises(ValueError, match=r"renders no part of messages\[0\].content"):
        render(USER, template, allow_fixed_text=False)


# --- common families ----------------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello"},
    {"role": "user", "content": "a"},
]
TOOL_TURNS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "get", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "get", "content": '{"celsius": 3}'},
    {"role": "assistant", "content": "3 degrees"},
    {"role": "user", "content": "Thanks"},
]
CONVERSATIONS = {
    "one message": USER,
    "turns": TURNS,
    "system": [{"role": "system", "content": "Be brief."}, *TURNS],
    "parts": [
        {"role": "system", "content": ["Be", "brief"]},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ],
    "only reasoning": [USER[0], {"role": "assistant", "content": "<think>\nHm.\n</think>"}, USER[0]],
}


def as_vllm_gives_it(messages: list[dict[str, Any]], walks_parts: bool) -> list[dict[str, Any]]:
    """vLLM's normalisation of the conversations above, written down independently."""
    given = json.loads(json.dumps(messages))
    for message in given:
        content = message["content"] or ""
        parts = [
            p if isinstance(p, dict) else {"type": "text", "text": p}
            for p in ([content] if isinstance(content, str) else content)
        ]
        parts_wanted = walks_parts and message["role"] != "tool"
        message["content"] = parts if parts_wanted else "\n".join(part["text"] for part in parts)
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return given


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompted", [True, False])
def test_common_families_render_as_in_vllm(family: str, conversation: str, prompted: bool) -> None:
    """Nothing that a family does on purpose is taken for a loss, and the prompt is that of transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, template = CONVERSATIONS[conversation], FAMILIES[family]
    ours = render(messages, template, add_generation_prompt=prompted, chat_template_kwargs=template_specials(template))
    given = as_vllm_gives_it(messages, compile_template(template).walks_parts)
    theirs = render_jinja_template([given], chat_template=template, add_generation_prompt=prompted, **SPECIAL)[0][0]
    if (family, conversation) == ("gemma", "parts"):  # it reads only the first part of a system prompt: given as one
        theirs = theirs.replace("\nBe\n", "\nBe\nbrief\n")
    assert ours == theirs


def template_specials(template: str) -> dict[str, str]:
    return {name: token for name, token in SPECIAL.items() if name in compile_template(template).variables}


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_tool_calls_of_common_families(family: str) -> None:
    template = FAMILIES[family]
    text = render(TOOL_TURNS, template, chat_template_kwargs=template_specials(template))
    for part in ("Weather?", "get", "Oslo", '"city"', "celsius", "3 degrees", "Thanks"):
        assert part in text
    assert "None" not in text
    if family == "deepseek":
        return  # transformers and vLLM fail here: the template adds the arguments to a string
    from transformers.utils.chat_template_utils import render_jinja_template

    given = as_vllm_gives_it(TOOL_TURNS, walks_parts=False)
    assert text == render_jinja_template([given], chat_template=template, add_generation_prompt=True, **SPECIAL)[0][0]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {*WITH_TOOLS, "gemma"}))
def test_families_without_tools_refuse_tool_calls(family: str) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\].tool_calls\[0\]"):
        render(TOOL_TURNS, FAMILIES[family])


# --- named templates ----------------------------------------------------------------------------------------------

NAMED = {"default": "D:{{ messages[0].content }}", "tool_use": "T{{ tools | length }}:{{ messages[0].content }}"}


def named_folder(folder: Path, kind: str) -> Tokenizer:
    """The same two templates in each of the places where models keep them."""
    byte_level().backend.save(str(folder / "tokenizer.json"))
    if kind in ("list", "dict"):
        listed = [{"name": name, "template": text} for name, text in NAMED.items()]
        content = {"eos_token": EOS, "chat_template": listed if kind == "list" else NAMED}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    elif kind == "processor":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": NAMED}))
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(NAMED["tool_use"])
        if kind == "files":
            (folder / "chat_template.jinja").write_text(NAMED["default"])
        else:
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED["default"]}))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("kind", ["list", "dict", "processor", "files", "file and config"])
def test_named_templates(kind: str, tmp_path: Path) -> None:
    """vllm-project/vllm issues 5309 and 12423."""
    tokenizer = named_folder(tmp_path, kind)
    assert tokenizer.chat_template == NAMED["default"]
    assert tokenizer.apply_chat_template(USER) == "D:Hi there"
    assert tokenizer.apply_chat_template(USER, tools=TOOLS) == "T1:Hi there"
    assert tokenizer.apply_chat_template(USER, tools=TOOLS, chat_template="default") == "D:Hi there"
    assert tokenizer.apply_chat_template(USER, tools=TOOLS, chat_template="tool_use") == "T1:Hi there"
    assert tokenizer.apply_chat_template(USER, chat_template="{{ messages[0].content }}!") == "Hi there!"
    with pytest.raises(ValueError, match="no chat template is named 'rag': this model has 'default', 'tool_use'"):
        tokenizer.apply_chat_template(USER, chat_template="rag")


def test_several_templates_without_a_default(tmp_path: Path) -> None:
    byte_level().backend.save(str(tmp_path / "tokenizer.json"))
    listed = [
        {"name": "tool_use", "template": NAMED["tool_use"]},
        {"name": "rag", "template": "{{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template is None
    assert tokenizer.apply_chat_template(USER, tools=TOOLS) == "T1:Hi there"
    with pytest.raises(ValueError, match="no default chat template: pass chat_template= one of 'rag', 'tool_use'"):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize("value", [5, {"default": 5}, [{"name": "x"}], ["text"]])
def test_a_chat_template_that_is_none(value: Any, tmp_path: Path) -> None:
    byte_level().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    if value == ["text"]:
        assert Tokenizer.from_folder(tmp_path).chat_template is None
        return
    with pytest.raises(ValueError, match="chat_template must be a text, or a list of named templates"):
        Tokenizer.from_folder(tmp_path)


# --- options and variables ----------------------------------------------------------------------------------------

THINK = "{{ messages[0].content }}{% if enable_thinking is sameas false %}<think></think>{% endif %}"


def test_template_variables_both_ways() -> None:
    """vllm-project/vllm issue 18066. What is given directly wins over `chat_template_kwargs`, as in vLLM."""
    off = render(USER, THINK, enable_thinking=False)
    assert off == "Hi there<think></think>" == render(USER, THINK, chat_template_kwargs={"enable_thinking": False})
    assert render(USER, THINK, chat_template_kwargs={"enable_thinking": False}, enable_thinking=True) == "Hi there"
    assert render(USER, THINK, chat_template_kwargs={"enable_thinking": False}, enable_thinking=None) == off
    assert render(USER, THINK, chat_template_kwargs=None) == "Hi there"
    assert render(USER, QWEN3, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_options_may_stand_in_chat_template_kwargs() -> None:
    template = "{{ messages[0].content }}{{ add_generation_prompt }}{{ tools | length if tools else 0 }}{{ documents }}"
    nested = {"add_generation_prompt": False, "tools": TOOLS, "documents": [{"title": "t"}]}
    assert render(USER, template, chat_template_kwargs=nested) == "Hi thereFalse1[{'title': 't'}]"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "chat_template_content_format"])
def test_what_may_not_stand_in_chat_template_kwargs(name: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs may not hold '{name}'"):
        render(USER, THINK, chat_template_kwargs={name: "x"})


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"enable_thinkin": False}, "unknown keyword 'enable_thinkin'; did you mean 'enable_thinking'"),
    ({"tool": [{"name": "f"}]}, "unknown keyword 'tool'; did you mean 'tools'"),
    ({"chat_templates": "x"}, "did you mean 'chat_template'"),
    ({"temperature": 0}, r"'temperature': it is a sampling parameter, so pass SamplingParams\(temperature=...\)"),
    ({"qqq": 1}, r"keyword 'qqq'; known: .*enable_thinking.* \(the chat template does not read 'qqq' either\)"),
]


@pytest.mark.parametrize(("keywords", "error"), UNKNOWN)
def test_an_unknown_keyword_is_refused_with_the_nearest_one(keywords: dict[str, Any], error: str) -> None:
    with pytest.raises(TypeError, match=error):
        render(USER, THINK, **keywords)


def test_a_name_in_chat_template_kwargs_that_the_template_does_not_read_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Clients send `enable_thinking` to every model (vllm-project/guidellm issue 281)."""
    assert render(USER, "{{ messages[0].content }}", chat_template_kwargs={"enable_thinking": False}) == "Hi there"
    assert "does not read 'enable_thinking'" in caplog.text


@pytest.mark.parametrize("value", [5, [1], "x"])
def test_chat_template_kwargs_must_be_a_dict(value: Any) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs must be a dict"):
        render(USER, THINK, chat_template_kwargs=value)


def test_tools_that_the_template_does_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    render(USER, THINK, tools=TOOLS)
    assert "the chat template does not read tools" in caplog.text
    with pytest.raises(ValueError, match="documents must be a list"):
        render(USER, THINK, documents="text")


CHATML_STRIP = each("<{{ m.role }}>{{ m.content | trim }}</>")


@pytest.mark.parametrize("template", [CHATML_STRIP, CHATML_STRIP.replace(" | trim", "")])
@pytest.mark.parametrize("text", ["I am", "I am ", "", "a\nb"])
def test_continuing_the_last_message_as_transformers_does(template: str, text: str) -> None:
    """The prompt ends with the text of the last message, so that the model goes on with it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [*USER, {"role": "assistant", "content": text}]
    ours = render(messages, template, add_generation_prompt=False, continue_final_message=True)
    assert ours == render_jinja_template([messages], chat_template=template, continue_final_message=True)[0][0]
    parts = [*USER, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    assert render(parts, template, add_generation_prompt=False, continue_final_message=True) == ours


def test_continuing_is_refused_where_it_cannot_be_done() -> None:
    with pytest.raises(ValueError, match="pass add_generation_prompt=False"):
        render(USER, CHATML_STRIP, continue_final_message=True)
    cut = "{{ messages[0].content }}{% if messages[1] %}{{ messages[1].content[:1] }}{% endif %}"
    messages = [*USER, {"role": "assistant", "content": "I am"}]
    with pytest.raises(ValueError, match="drops the end of the last message"):
        render(messages, cut, continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(ValueError, match=r"messages\[1\] has no text to continue"):
        nothing = [*USER, {"role": "assistant", "content": None}]
        render(nothing, CHATML_STRIP, continue_final_message=True, add_generation_prompt=False)
    for field in ("reasoning_content", 1):  # transformers 5 takes the name of a field; vLLM does not
        with pytest.raises(ValueError, match="continue_final_message must be True or False"):
            render(messages, CHATML_STRIP, continue_final_message=field, add_generation_prompt=False)
