"""langchain-openai against `folovllm serve`: invoke, stream and batch, for chats and for completions.

Milestone: M8.
"""

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.conftest import MODEL
from tests.clients.server_process import ServerProcess

pytestmark = pytest.mark.m8

MESSAGES = [SystemMessage("Answer in one word."), HumanMessage("What is the capital of France?")]
QUESTIONS = ["Name a color.", "Name an animal.", "Name a city.", "Name a fruit."]


@pytest.fixture
def options(server: ServerProcess) -> dict[str, Any]:
    return {
        "model": MODEL,
        "base_url": f"{server.url}/v1",
        "api_key": "unused",
        "temperature": 0,
        "max_tokens": 10,
        "max_retries": 0,
    }


def test_invoke_and_stream(options: dict[str, Any]) -> None:
    chat = ChatOpenAI(**options)
    answer = chat.invoke(MESSAGES)
    assert answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["model_name"] == MODEL
    assert 0 < answer.usage_metadata["output_tokens"] <= 10
    parts = list(ChatOpenAI(**options, stream_usage=True).stream(MESSAGES))
    assert len(parts) > 1
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    assert whole.content == answer.content
    assert whole.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]


def test_batch_is_in_order(options: dict[str, Any]) -> None:
    chat = ChatOpenAI(**options)
    alone = [chat.invoke(question).content for question in QUESTIONS]
    assert [answer.content for answer in chat.batch(QUESTIONS)] == alone
    assert [answer.content for answer in asyncio.run(chat.abatch(QUESTIONS))] == alone


def test_logprobs(options: dict[str, Any]) -> None:
    answer = ChatOpenAI(**options).bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_completions(options: dict[str, Any]) -> None:
    model = OpenAI(**options)
    text = model.invoke("The capital of France is")
    assert text.startswith(" Paris")
    assert "".join(model.stream("The capital of France is")) == text
    assert model.batch(["The capital of France is", "2, 4, 6, 8,"])[0] == text


def test_an_error_reaches_the_caller(options: dict[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(**options | {"model": "another"}).invoke(MESSAGES)
