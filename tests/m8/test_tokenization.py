"""/tokenize and /detokenize: vLLM's forms of request and answer."""

from collections.abc import Iterator

import pytest

from tests.m1.tiny_tokenizers import byte_level
from tests.m8.server_process import CHAT_TEMPLATE, RunningServer, running_server

pytestmark = pytest.mark.m8

MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.mark.parametrize("text", ["", "the quick fox", "你好 😀", "the fox " * 2000])
def test_a_text_goes_to_tokens_and_back(server: RunningServer, text: str) -> None:
    answer = server.post("/tokenize", {"prompt": text}).json
    tokens = byte_level().encode(text)
    assert answer == {"count": len(tokens), "max_model_len": 256, "tokens": tokens, "token_strs": None}
    assert server.post("/detokenize", {"tokens": tokens}).json == {"prompt": text}


def test_token_strings_are_those_of_the_vocabulary(server: RunningServer) -> None:
    answer = server.post("/tokenize", {"prompt": " the fox", "return_token_strs": True}).json
    assert "".join(answer["token_strs"]) == "ĠtheĠfox"
    assert len(answer["token_strs"]) == answer["count"]


def test_a_conversation_is_tokenised_as_a_chat_is(server: RunningServer) -> None:
    answer = server.post("/tokenize", {"messages": MESSAGES}).json
    rendered = byte_level().chat_prompt(MESSAGES, CHAT_TEMPLATE)
    assert answer["tokens"] == rendered["prompt_token_ids"]
    usage = server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json["usage"]
    assert usage["prompt_tokens"] == answer["count"]
    without = server.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json
    assert without["count"] == answer["count"] - 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}, 5]}, "messages.1"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": None}]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ messages }}"}, "chat_template"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [2**40]}, "tokens.0"),
        ("/detokenize", {"tokens": [420]}, "tokens"),
        ("/detokenize", {"tokens": "12"}, "tokens"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
    ],
)
def test_what_cannot_be_tokenised_is_refused(
    server: RunningServer, path: str, body: dict[str, object], param: str
) -> None:
    answer = server.post(path, body)
    assert answer.status == (404 if param == "model" else 400) and answer.error["param"] == param


def test_a_server_without_a_tokenizer_says_so() -> None:
    with running_server({"skip_tokenizer": True}) as server:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            answer = server.post(path, body)
            assert answer.status == 400 and "--skip-tokenizer-init" in answer.error["message"]
