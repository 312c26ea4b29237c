"""litellm against `folovllm serve`: its OpenAI-compatible provider, and the one that it has for vLLM's server.

Milestone: M8.
"""

import asyncio
import os
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm would fetch a price list from the internet
import litellm

from tests.clients.conftest import MODEL
from tests.clients.server_process import ServerProcess

# litellm declares types that pydantic warns of.
pytestmark = [pytest.mark.m8, pytest.mark.filterwarnings("ignore:Items? .*ReadOnly:UserWarning")]

MESSAGES = [{"role": "user", "content": "Name three colors."}]


@pytest.fixture(params=["openai", "hosted_vllm"])
def arguments(server: ServerProcess, request: pytest.FixtureRequest) -> dict[str, Any]:
    return {
        "model": f"{request.param}/{MODEL}",
        "api_base": f"{server.url}/v1",
        "api_key": "unused",
        "temperature": 0,
        "max_tokens": 10,
        "num_retries": 0,
    }


def test_completion_and_stream(arguments: dict[str, Any]) -> None:
    whole = litellm.completion(messages=MESSAGES, **arguments)
    assert whole.choices[0].message.content and whole.usage.completion_tokens == 10
    stream = litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **arguments)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert rebuilt.choices[0].message.content == text
    assert rebuilt.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert rebuilt.usage.completion_tokens == 10


def test_async_completion_and_stream(arguments: dict[str, Any]) -> None:
    async def main() -> tuple[str, str]:
        whole = await litellm.acompletion(messages=MESSAGES, **arguments)
        stream = await litellm.acompletion(messages=MESSAGES, stream=True, **arguments)
        return whole.choices[0].message.content, "".join([c.choices[0].delta.content or "" async for c in stream])

    whole, streamed = asyncio.run(main())
    assert whole == streamed != ""


def test_text_completion(arguments: dict[str, Any]) -> None:
    answer = litellm.text_completion(prompt="The capital of France is", **arguments)
    assert answer.choices[0].text.startswith(" Paris")


def test_errors_are_mapped(arguments: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=MESSAGES, **arguments | {"temperature": -1})
    provider = arguments["model"].split("/")[0]
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=MESSAGES, **arguments | {"model": f"{provider}/another"})
