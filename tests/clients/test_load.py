"""500 requests by 64 clients at a time, real model: every answer is the one that the request gets alone.

Milestone: M8. fp32 and greedy, so "the same" means the same tokens and the same logprobs up to rounding; the logprobs
are also a fingerprint, which two different requests hardly share.
"""

import asyncio
from typing import Any

import openai
import pytest

from tests.clients.conftest import MODEL, project
from tests.clients.server_process import ServerProcess

pytestmark = [pytest.mark.m8, pytest.mark.slow]

NUM_REQUESTS = 500
NUM_CLIENTS = 64
THINGS = ["apple", "river", "candle", "violin", "glacier", "harbor", "pencil", "meadow", "kettle", "lantern"]
FORMS = [
    "The {} in room {} was",
    "There were {1} of them. A {0} is",
    "{1}. {0}:",
    "My {} number {} has",
    "{} {} and the",
]


def make_requests() -> list[dict[str, Any]]:
    """Different prompts with different lengths of answers; some share prefixes, which the server caches."""
    return [
        {"prompt": FORMS[i % 5].format(THINGS[i // 5 % 10], i), "max_tokens": 3 + i % 7} for i in range(NUM_REQUESTS)
    ]


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    """The offline engine's answers."""
    requests = make_requests()
    return project(
        "generate",
        model=MODEL,
        prompts=[request["prompt"] for request in requests],
        max_tokens=[request["max_tokens"] for request in requests],
    )


def test_64_streaming_clients_lose_and_mix_up_nothing(server: ServerProcess, answers: list[dict[str, Any]]) -> None:
    before = server.metrics()
    got = asyncio.run(stream_all(server, make_requests()))
    assert len(got) == NUM_REQUESTS
    for index, (ours, expected) in enumerate(zip(got, answers, strict=True)):
        assert ours["text"] == expected["text"], f"request {index}"
        assert ours["finish_reason"] == expected["finish_reason"], f"request {index}"
        assert ours["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3), f"request {index}"
    assert len({ours["id"] for ours in got}) == NUM_REQUESTS
    server.wait_until_idle(5)
    after = server.metrics()
    num_tokens = sum(len(answer["token_ids"]) for answer in answers)
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == num_tokens
    assert after["vllm:request_success_total"] - before["vllm:request_success_total"] == NUM_REQUESTS


async def stream_all(server: ServerProcess, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All answers in order, NUM_CLIENTS at a time."""
    seats = asyncio.Semaphore(NUM_CLIENTS)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=240) as client:

        async def answer(request: dict[str, Any]) -> dict[str, Any]:
            async with seats:
                return await stream_one(client, request)

        return await asyncio.gather(*map(answer, requests))


async def stream_one(client: openai.AsyncOpenAI, request: dict[str, Any]) -> dict[str, Any]:
    """One streamed completion, put together; fails if two answers share a stream."""
    stream = await client.completions.create(model=MODEL, temperature=0, logprobs=0, stream=True, **request)
    text, logprobs, ids, finish_reasons = "", [], set(), []
    async for chunk in stream:
        (choice,) = chunk.choices
        assert not finish_reasons, "nothing follows the last chunk"
        text += choice.text
        logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
        ids.add(chunk.id)
        finish_reasons += [choice.finish_reason] if choice.finish_reason else []
    (finish_reason,) = finish_reasons
    (request_id,) = ids
    return {"text": text, "logprobs": logprobs, "id": request_id, "finish_reason": finish_reason}
