"""Keywords of `LLM.generate`, `stream`, `chat` and `chat_prompt`: an unknown one never goes unnoticed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.keywords import VLLM_ONLY

pytestmark = pytest.mark.m1

CHAT = [{"role": "user", "content": "the then"}]
PARAMS = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Callable[[str], Path]) -> LLM:
    return LLM(str(tiny_model_dir("llama")))


def call(llm: LLM, method: str, **keywords: Any) -> Any:
    return getattr(llm, method)(CHAT if method in ("chat", "chat_prompt") else "the then", **keywords)


@pytest.mark.parametrize(
    ("method", "name", "near"),
    [
        ("generate", "sampling_param", "sampling_params"),
        ("generate", "prioritys", "priority"),
        ("generate", "use_tdqm", "use_tqdm"),
        ("stream", "sampling_parms", "sampling_params"),
        ("chat", "sampling_param", "sampling_params"),
        ("chat", "add_generation_promp", "add_generation_prompt"),
        ("chat", "chat_template_kwarg", "chat_template_kwargs"),
        ("chat_prompt", "document", "documents"),
    ],
)
def test_the_nearest_name_is_suggested(llm: LLM, method: str, name: str, near: str) -> None:
    """A TypeError at the call itself, also where the method is a generator."""
    with pytest.raises(TypeError, match=f"unknown keyword '{name}'; did you mean '{near}'"):
        call(llm, method, **{name: 1})


@pytest.mark.parametrize("method", ["generate", "stream", "chat", "chat_prompt"])
def test_the_name_is_wrong_whatever_the_value_is(llm: LLM, method: str) -> None:
    """A template variable can be no SamplingParams, but that is not what is wrong with `sampling_param=`."""
    with pytest.raises(TypeError, match="unknown keyword 'sampling_param'; did you mean 'sampling_params'"):
        call(llm, method, sampling_param=PARAMS)


@pytest.mark.parametrize("method", ["generate", "stream", "chat", "chat_prompt"])
def test_a_sampling_parameter_is_told_where_it_belongs(llm: LLM, method: str) -> None:
    with pytest.raises(
        TypeError, match=r"'max_tokens': it is a sampling parameter, so pass SamplingParams\(max_tokens=...\)"
    ):
        call(llm, method, max_tokens=5)


@pytest.mark.parametrize("method", ["generate", "stream", "chat", "chat_prompt"])
@pytest.mark.parametrize("name", VLLM_ONLY)
def test_what_only_vllm_has_is_answered_with_what_to_do(llm: LLM, method: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is a keyword of vLLM's that FoloVLLM does not have: .{{12}}"):
        call(llm, method, **{name: {"x": 1}})


def test_a_keyword_of_vllm_that_asks_for_nothing_may_stay(llm: LLM) -> None:
    plain = llm.generate("the then", PARAMS, use_tqdm=False)[0].outputs[0]
    assert llm.generate("the then", PARAMS, use_tqdm=False, lora_request=None)[0].outputs[0].text == plain.text
    assert call(llm, "chat_prompt", lora_request=None, mm_processor_kwargs=None) == call(llm, "chat_prompt")


def test_the_keywords_of_chat_reach_the_template(llm: LLM) -> None:
    template = "{{ messages[0].content }}{{ tools | length if tools }}{{ documents | length if documents }}{{ mood }}"
    keywords: dict[str, Any] = {"tools": [{"name": "f"}], "documents": [{"title": "t"}] * 2, "mood": "!"}
    assert llm.chat_prompt(CHAT, template, **keywords)["prompt"] == "the then12!"
    output = llm.chat(CHAT, PARAMS, use_tqdm=False, chat_template=template, chat_template_kwargs=keywords)[0]
    assert output.prompt == "the then12!"
    parts = [{"role": "user", "content": [{"type": "text", "text": "the"}, "then"]}]
    assert llm.chat(parts, PARAMS, use_tqdm=False, chat_template=template, mood="?")[0].prompt == "the\nthen?"


def test_a_conversation_whose_text_the_template_drops_is_refused_by_llm(llm: LLM) -> None:
    for template in ("fixed\n", "{% for m in messages %}{{ m.role }}{% endfor %}"):
        with pytest.raises(ValueError, match=r"renders no part of messages\[0\].content \(role 'user'\)"):
            llm.chat(CHAT, PARAMS, use_tqdm=False, chat_template=template)


def test_of_several_conversations_the_bad_one_is_named(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"conversation 1: messages\[0\] needs a 'content'"):
        llm.chat([CHAT, [{"role": "user"}]], PARAMS, use_tqdm=False)


def test_scripts_for_transformers_may_say_tokenize_false(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="pass the text to encode"):
        tokenizer.apply_chat_template(CHAT, tokenize=True)
