"""The `openai` package, sync and async, against `folovllm serve` with the default model.

Milestone: M8.
"""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import MODEL
from tests.clients.server_process import ServerProcess

pytestmark = pytest.mark.m8

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colors."}]
LONG = {"max_tokens": 4000, "temperature": 0, "extra_body": {"ignore_eos": True}}  # minutes, if it is not aborted
ABORT_SECONDS = 3  # a generous bound: what is aborted late runs for minutes
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def async_client(server: ServerProcess) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def assert_openai_error(error: openai.APIStatusError, status: int) -> None:
    """The body is {"error": {"message", "type", "param", "code"}}; the client keeps what is under "error"."""
    assert error.status_code == status
    assert isinstance(error.body, dict) and set(error.body) == {"message", "type", "param", "code"}
    assert error.body["message"] and error.body["type"]
    assert "Traceback" not in str(error.body) and "http" not in error.body["message"]


# ---- completions


def test_a_completion_and_its_stream_are_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0)
    assert whole.object == "text_completion" and whole.model == MODEL and whole.id.startswith("cmpl-")
    assert whole.choices[0].text.startswith(" Paris")
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 12, 17)

    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(parts) > 1


def test_the_default_of_a_completion_is_16_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_continuous_usage_counts_up(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, stream=True, extra_body={"stream_options": options}
    )
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[-1] == 6


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert choice.text.startswith(PROMPT)
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 8
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(8)]
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert 2 <= len(top) <= 3 and top[token] == logprob <= max(top.values()) <= 0
    for logprob, top in list(zip(found.token_logprobs, found.top_logprobs, strict=True))[5:]:
        assert logprob == max(top.values()), "greedy decoding takes the most probable token"


def test_batches_of_texts_and_of_token_ids(client: openai.OpenAI, server: ServerProcess) -> None:
    texts = [PROMPT, "2, 4, 6, 8,", "Once upon a time"]
    alone = [client.completions.create(model=MODEL, prompt=text, max_tokens=6, temperature=0) for text in texts]
    batch = client.completions.create(model=MODEL, prompt=texts, max_tokens=6, temperature=0)
    assert [choice.index for choice in batch.choices] == [0, 1, 2]
    assert [choice.text for choice in batch.choices] == [answer.choices[0].text for answer in alone]
    assert batch.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    ids = [json.loads(server.post("/tokenize", {"prompt": text})[1])["tokens"] for text in texts]
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=6, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in batch.choices]


def test_n_completions_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def texts() -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=1.5, n=3, seed=7)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.completion_tokens <= 24
        return [choice.text for choice in answer.choices]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_n_streams_are_told_apart_by_their_index(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 7}
    whole = client.completions.create(model=MODEL, **arguments)
    texts = ["", "", ""]
    for chunk in client.completions.create(model=MODEL, stream=True, **arguments):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_a_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4,", max_tokens=30, temperature=0, stop=["7"]
    ).choices[0]
    assert "5, 6" in choice.text and "7" not in choice.text
    assert choice.finish_reason == "stop" and choice.model_extra["stop_reason"] == "7"


def test_vllm_fields_in_extra_body(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> str:
        return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, extra_body=extra).choices[0].text

    greedy = text(temperature=0)
    assert text(temperature=2, top_k=1) == greedy
    assert text(temperature=0, bad_words=["Paris"]) != greedy
    assert text(temperature=0, min_tokens=4, cache_salt="mine") == greedy


# ---- chat


def test_a_chat_and_its_stream_are_the_same(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    message = whole.choices[0].message
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert message.role == "assistant" and message.content and not message.tool_calls
    assert whole.usage.completion_tokens <= 16

    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    first, *rest, last = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == message.content
    assert rest[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1


def test_the_stream_helper_of_the_client(client: openai.OpenAI) -> None:
    """`chat.completions.stream` puts the chunks together again, and is strict about their form.

    It raises an error for an answer that the length ended, so a stop string ends this one.
    """
    arguments: dict[str, Any] = {"max_completion_tokens": 60, "temperature": 0, "stop": [" "]}
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, **arguments) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == deltas != ""


def test_chat_logprobs(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    content = choice.logprobs.content
    assert len(content) == 4
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == max(top.logprob for top in entry.top_logprobs)
    bare = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=2, temperature=0, logprobs=True
    )
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content] == [[], []]


def test_streamed_logprobs_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 6, "temperature": 0}
    arguments |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**arguments).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**arguments, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    for ours, theirs in zip(streamed, whole, strict=True):
        assert math.isclose(ours.logprob, theirs.logprob, abs_tol=1e-3)


def test_tools_go_to_the_template_only_with_tool_choice_none(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 4, "tools": [TOOL]}
    answer = client.chat.completions.create(**arguments, tool_choice="none")
    assert answer.choices[0].message.content
    for refused in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match="tool") as caught:
            client.chat.completions.create(**arguments, **refused)
        assert_openai_error(caught.value, 400)


# ---- other routes


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL and model.object == "model"
    assert "/" not in str(model.model_extra.get("root")), "the model's path is no client's business"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert_openai_error(caught.value, 404)


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Name three colors.", max_output_tokens=16, temperature=0)
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=16, temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Hello", tools=[{"type": "web_search"}])
    assert_openai_error(caught.value, 400)


def test_streamed_responses(client: openai.OpenAI) -> None:
    stream = client.responses.create(
        model=MODEL, input="Name three colors.", max_output_tokens=12, temperature=0, stream=True
    )
    events = list(stream)
    assert events[0].type == "response.created"
    final = events[-1]
    assert final.type in ("response.completed", "response.incomplete")
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.response.output_text != ""
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_raw_responses_carry_the_request_id(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1}
    raw = client.completions.with_raw_response.create(**arguments, extra_headers={"X-Request-Id": "mine-17"})
    assert raw.headers["x-request-id"] == "mine-17"
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.parse().choices[0].text
    assert client.completions.create(**arguments)._request_id, "the server makes an id if the client gives none"
    streamed = client.completions.with_raw_response.create(**arguments, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream") and streamed.headers["x-request-id"]
    assert list(streamed.parse())


# ---- errors

BAD_FIELDS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": -1},
    "top_p": {"top_p": 7},
    "max_tokens": {"max_tokens": -3},
    "max_tokens over the context": {"max_tokens": 10**6},
    "n at temperature 0": {"n": 2, "temperature": 0},
    "logprobs": {"logprobs": 21},
    "stop": {"stop": ["a", "b", "c", "d", "e"]},
    "stream_options without stream": {"stream_options": {"include_usage": True}},
    "logit_bias": {"logit_bias": {"9999999": 1.0}},
    "best_of": {"best_of": 3},
    "suffix": {"suffix": "!"},
    "echo": {"extra_body": {"echo": "perhaps"}},
    "response_format": {"extra_body": {"response_format": {"type": "json_object"}}},
}


@pytest.mark.parametrize("arguments", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_bad_field_is_a_bad_request_error(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, **arguments)
    assert_openai_error(caught.value, 400)


def test_a_prompt_that_is_too_long_is_told_both_lengths(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="8192") as caught:
        client.completions.create(model=MODEL, prompt=[1] * 9000, max_tokens=1)
    assert "9000" in str(caught.value)
    assert_openai_error(caught.value, 400)


def test_what_is_not_there_is_a_not_found_error(client: openai.OpenAI) -> None:
    for call in (
        lambda: client.completions.create(model="another", prompt=PROMPT),
        lambda: client.chat.completions.create(model="another", messages=MESSAGES),
        lambda: client.embeddings.create(model=MODEL, input="text"),
        lambda: client.files.list(),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert_openai_error(caught.value, 404)


def test_a_wrong_key_is_an_authentication_error(serve_tiny: Callable[..., Any]) -> None:
    with serve_tiny("--api-key", "first", "--api-key", "second", "--served-model-name", "tiny") as guarded:

        def connect(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)

        for key in ("first", "second"):
            assert [model.id for model in connect(key).models.list()] == ["tiny"]
        for key in ("third", "firs", "first!", "FIRST", "first,second"):
            with pytest.raises(openai.AuthenticationError) as caught:
                connect(key).completions.create(model="tiny", prompt="Hello", max_tokens=1)
            assert_openai_error(caught.value, 401)
            assert "first" not in str(caught.value.body).replace(key, "")
        assert guarded.get("/health")[0] == guarded.get("/metrics")[0] == 200
        assert "first" not in guarded.log_text(), "keys stay out of the log"


def test_a_full_queue_is_a_rate_limit_error(serve_tiny: Callable[..., Any]) -> None:
    """With room for one request the second is refused; a client that retries gets its turn."""
    with serve_tiny("--max-num-seqs", "1", "--max-queue", "0", "--served-model-name", "tiny") as narrow:
        client = openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="unused", max_retries=0)
        long = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(long))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="Hello", max_tokens=1)
        assert_openai_error(caught.value, 429)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        long.close()
        answer = client.with_options(max_retries=5).completions.create(model="tiny", prompt="Hello", max_tokens=1)
        assert answer.usage.completion_tokens == 1


# ---- clients that leave


def test_a_timeout_frees_the_blocks(client: openai.OpenAI, server: ServerProcess) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            answer = client.with_options(timeout=openai.Timeout(60, read=0.01)).completions.create(
                model=MODEL, prompt=PROMPT, stream=stream, **LONG
            )
            list(answer)
        server.wait_until_idle(ABORT_SECONDS)


def test_a_closed_stream_frees_the_blocks(client: openai.OpenAI, server: ServerProcess) -> None:
    stream = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **LONG)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    assert server.load()["running"] == 1
    stream.close()
    server.wait_until_idle(ABORT_SECONDS)


def test_cancelled_tasks_free_the_blocks(server: ServerProcess) -> None:
    """asyncio cancels a task that waits for a whole answer, and one that is in the middle of a stream."""

    async def read(client: openai.AsyncOpenAI, stream: bool) -> None:
        answer = await client.completions.create(model=MODEL, prompt=PROMPT, stream=stream, **LONG)
        async for _chunk in answer:
            pass

    async def main() -> None:
        async with async_client(server) as client:
            tasks = [asyncio.create_task(read(client, stream)) for stream in (False, True, True)]
            await asyncio.to_thread(server.wait_until_running, 3)
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await asyncio.to_thread(server.wait_until_idle, ABORT_SECONDS)

    asyncio.run(main())


# ---- async


def test_async_answers_are_the_sync_ones(client: openai.OpenAI, server: ServerProcess) -> None:
    prompts = [PROMPT, "2, 4, 6, 8,", "Once upon a time", "The sun is"]
    arguments: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    expected = [client.completions.create(prompt=prompt, **arguments).choices[0].text for prompt in prompts]

    async def main() -> tuple[list[str], list[str]]:
        async with async_client(server) as client:

            async def whole(prompt: str) -> str:
                return (await client.completions.create(prompt=prompt, **arguments)).choices[0].text

            async def streamed(prompt: str) -> str:
                stream = await client.completions.create(prompt=prompt, stream=True, **arguments)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return (
                await asyncio.gather(*map(whole, prompts)),
                await asyncio.gather(*map(streamed, prompts)),
            )

    wholes, streams = asyncio.run(main())
    assert wholes == streams == expected


def test_async_chat_models_and_errors(server: ServerProcess) -> None:
    async def main() -> None:
        async with async_client(server) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            stream = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_completion_tokens=6, temperature=0, stream=True
            )
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            whole = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_completion_tokens=6, temperature=0
            )
            assert streamed == whole.choices[0].message.content
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model=MODEL, messages=[])

    asyncio.run(main())
