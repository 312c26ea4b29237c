"""POST /v1/chat/completions: the shapes of its answers, streamed and not, the prompt, and what it refuses."""

import asyncio

import pytest

from folovllm.entrypoints.openai.state import make_state
from tests.m1.tiny_tokenizers import byte_level
from tests.m8.api_helpers import (
    CHAT_TEMPLATE,
    build_app,
    chat_tokenizer,
    join_choices,
    logprob_of,
    make_client,
    slow_executor,
    with_client,
)
from tests.m8.serving_helpers import VOCAB_SIZE, eventually, oracle, run_async

pytestmark = pytest.mark.m8

PATH = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
HI = "<|user|>user: Hi<|end|><|user|>assistant: "  # the prompt of the message "Hi"


def encode(text):
    token_ids = byte_level().encode(text, add_special_tokens=False)
    assert max(token_ids) < VOCAB_SIZE, "the fake model does not know these tokens"
    return token_ids


def text_of(token_ids, prompt):
    tokenizer = byte_level()
    return tokenizer.decode(prompt + token_ids)[len(tokenizer.decode(prompt)) :]


async def prompt_of(client, content="Hi", **fields):
    """The prompt that the model sees, as text."""
    answer = await client.chat(content, max_tokens=1, return_token_ids=True, **fields)
    assert answer.status == 200, answer.error
    return byte_level().decode(answer.json["prompt_token_ids"], skip_special_tokens=False)


async def refusal(client, content="Hi", **fields):
    answer = await client.chat(content, **fields)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    return answer.error


# ---- an answer that is not streamed


@with_client()
async def test_the_whole_answer(client):
    body = (await client.chat("Hi", max_tokens=5)).json
    prompt = encode(HI)
    assert body.pop("id").startswith("chatcmpl-") and isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": client.state.model_names[0],
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": text_of(oracle(prompt, 5), prompt),
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": 5,
            "total_tokens": len(prompt) + 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "prompt_logprobs": None,
    }


@with_client()
async def test_without_a_limit_the_answer_fills_the_context(client):
    body = (await client.chat("Hi", max_tokens=None)).json
    assert body["usage"]["total_tokens"] == 256 and body["choices"][0]["finish_reason"] == "length"
    body = (await client.chat("Hi", max_tokens=9, max_completion_tokens=2)).json
    assert body["usage"]["completion_tokens"] == 2


@with_client(sampling_defaults={"max_tokens": 3})
async def test_the_models_own_limit(client):
    assert (await client.chat("Hi", max_tokens=None)).json["usage"]["completion_tokens"] == 3


@with_client()
async def test_ids_n_and_logprobs(client):
    prompt = encode(HI)
    fields = {"n": 2, "temperature": 1, "max_tokens": 3, "return_token_ids": True, "prompt_logprobs": 0}
    body = (await client.chat("Hi", **fields, logprobs=True, top_logprobs=1)).json
    assert body["prompt_token_ids"] == prompt and body["usage"]["prompt_tokens"] == len(prompt)
    assert body["prompt_logprobs"][0] is None and len(body["prompt_logprobs"]) == len(prompt)
    for index, choice in enumerate(body["choices"]):
        assert choice["index"] == index and choice["token_ids"] == oracle(prompt, 3)
        content = choice["logprobs"]["content"]
        assert [entry["logprob"] for entry in content] == [logprob_of(i) for i in oracle(prompt, 3)]
        assert all([top["logprob"] for top in entry["top_logprobs"]] == [logprob_of(0)] for entry in content)
        assert all(entry["bytes"] == list(entry["token"].encode()) for entry in content)
    (choice,) = (await client.chat("Hi", logprobs=True)).json["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * 4


# ---- streams


@with_client()
async def test_the_chunks_of_a_stream(client):
    answer = await client.chat("Hi", max_tokens=3, stream=True)
    first, *others = answer.chunks
    assert len({(chunk["id"], chunk["created"]) for chunk in answer.chunks}) == 1
    for chunk in answer.chunks:
        assert list(chunk) == ["id", "object", "created", "model", "choices"]
        assert chunk["object"] == "chat.completion.chunk" and chunk["model"] == client.state.model_names[0]
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    for chunk in others[:-1]:
        (choice,) = chunk["choices"]
        assert list(choice) == ["index", "delta", "logprobs", "finish_reason"] and list(choice["delta"]) == ["content"]
    (last,) = others[-1]["choices"]
    assert last["finish_reason"] == "length" and last["stop_reason"] is None


PREFILLED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
CASES = {
    "plain": {},
    "n": {"n": 3, "temperature": 1.0},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "ids": {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True},
    "echo": {"messages": PREFILLED, "echo": True, **CONTINUE},
    "echo and n": {"messages": PREFILLED, "echo": True, "n": 2, "temperature": 1.0, **CONTINUE},
    "stop": {"stop": ["e", "o"], "max_tokens": 100},
}


@pytest.mark.parametrize("case", CASES)
@with_client()
async def test_the_chunks_join_to_the_whole_answer(client, case):
    fields = {"max_tokens": 8, **CASES[case]}
    whole = (await client.chat(fields.pop("messages", "Hi"), **fields)).json
    fields = {"max_tokens": 8, **CASES[case], "stream": True, "stream_options": {"include_usage": True}}
    chunks = (await client.chat(fields.pop("messages", "Hi"), **fields)).chunks
    joined = join_choices(chunks, fields.get("n", 1))
    for choice in whole["choices"]:
        choice["delta"] = {key: choice["message"][key] for key in ("role", "content")}
        del choice["message"]
        assert joined[choice["index"]] == choice
    assert chunks[0].get("prompt_token_ids") == whole.get("prompt_token_ids")
    assert not any("prompt_token_ids" in chunk for chunk in chunks[fields.get("n", 1) :])
    for usage in (whole["usage"], chunks[-1]["usage"]):
        del usage["prompt_tokens_details"]
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []


@with_client()
async def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = (await client.chat("Hi", stream=True, max_tokens=6, stream_options=options)).chunks
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len(encode(HI))}


@with_client()
async def test_the_role_waits_for_the_first_token(client):
    """Otherwise benchmarks would take the time to an empty chunk for the time to the first token."""
    fields = {"prompt": [5], "max_tokens": 200, "ignore_eos": True}
    answer = await client.chat("Hi", stream=True, max_tokens=1)
    assert len(answer.pieces) >= 1 and b'"role"' in answer.pieces[0] and b'"finish_reason":"length"' in answer.pieces[0]
    assert (await client.complete(**fields)).status == 200


# ---- the prompt


@with_client()
async def test_messages_are_rendered_by_the_template(client):
    conversation = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "pirate", "content": "c"},
    ]
    expected = "<|user|>system: be<|end|><|user|>user: a\nb<|end|><|user|>assistant: <|end|>"
    assert await prompt_of(client, conversation) == (
        expected + "<|user|>assistant: <|end|><|user|>pirate: c<|end|><|user|>assistant: "
    )


@with_client()
async def test_tools_and_documents_reach_the_template(client):
    assert await prompt_of(client, tools=TOOLS, tool_choice="none") == "[weather]" + HI
    assert await prompt_of(client, tool_choice="none") == HI
    assert await prompt_of(client, tools=None, tool_choice=None) == HI
    assert await prompt_of(client, documents=[{"title": "t", "text": "d"}]) == "(d)" + HI
    assert await prompt_of(client, chat_template_kwargs={"shout": True}) == "!" + HI


CALLS = [None, "auto", "required", {"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize("choice", [{}, *({"tool_choice": choice} for choice in CALLS)])
@with_client()
async def test_calls_cannot_be_parsed(client, choice):
    error = await refusal(client, tools=TOOLS, **choice)
    assert error["param"] == "tool_choice" and '"tool_choice": "none"' in error["message"]


@with_client()
async def test_other_tools_are_refused(client):
    assert (await refusal(client, tools=[]))["param"] == "tools"
    assert (await refusal(client, tool_choice="auto"))["param"] == "tool_choice"
    for tool in ({}, {"type": "function"}, {"function": {"name": 3}}, {"function": "weather"}):
        assert (await refusal(client, tools=[*TOOLS, tool], tool_choice="none"))["message"].startswith("tools[1]")
    assert (await refusal(client, tools=["weather"], tool_choice="none"))["param"].startswith("tools")


@with_client()
async def test_the_last_message_is_continued(client):
    assert await prompt_of(client, PREFILLED, **CONTINUE) == ("<|user|>user: Hi<|end|><|user|>assistant: I am")
    error = await refusal(client, PREFILLED, continue_final_message=True)
    assert error["param"] == "continue_final_message" and "add_generation_prompt" in error["message"]
    error = await refusal(client, PREFILLED, continue_final_message=True, add_generation_prompt=True)
    assert error["param"] == "continue_final_message"


@with_client()
async def test_echo_begins_with_the_prefilled_text(client):
    async def content(*args, **fields):
        return (await client.chat(*args, **fields)).json["choices"][0]["message"]["content"]

    plain = await content(PREFILLED, **CONTINUE)
    assert await content(PREFILLED, echo=True, **CONTINUE) == "I am" + plain
    parts = [PREFILLED[0], {"role": "assistant", "content": [{"type": "text", "text": "I am"}]}]
    assert await content(parts, echo=True, **CONTINUE) == "I am" + plain
    assert await content("Hi", echo=True) == await content("Hi")  # the user's words are not the assistant's


@with_client()
async def test_without_a_generation_prompt_the_last_role_goes_on(client):
    assert await prompt_of(client, add_generation_prompt=False) == "<|user|>user: Hi<|end|>"
    body = (await client.chat("Hi", add_generation_prompt=False)).json
    assert body["choices"][0]["message"]["role"] == "user"


@with_client()
async def test_truncation_keeps_the_end(client):
    answer = await client.chat("Hi " * 200, truncate_prompt_tokens=9, return_token_ids=True)
    whole = byte_level().encode(f"<|user|>user: {'Hi ' * 200}<|end|><|user|>assistant: ")
    assert answer.json["prompt_token_ids"] == whole[-9:]
    error = await refusal(client, "Hi " * 200)
    assert error["param"] == "messages" and error["code"] == "context_length_exceeded"
    error = await refusal(client, "x" * 20_000_000)
    assert error["param"] == "messages" and error["code"] == "context_length_exceeded"


@with_client()
async def test_special_tokens_beside_the_templates(client):
    asked = []
    client.engine.encode = lambda text, special=True: _answer(asked.append((text, special)), [5])
    for value in (None, False, True):
        answer = await client.chat("Hi", add_special_tokens=value, return_token_ids=True)
    assert asked == [(HI, True)] and answer.json["prompt_token_ids"] == [5]


async def _answer(_, value):
    return value


def test_the_servers_template_replaces_the_models():
    async def main():
        async with make_client() as client:
            state = make_state(client.engine, client.state.options, chat_template="<{{ messages[0].content }}>")
            client.app = build_app(state)
            assert await prompt_of(client) == "<Hi>"

    run_async(main)


@with_client(tokenizer=byte_level())
async def test_a_model_without_a_template(client):
    error = await refusal(client)
    assert error["param"] == "messages" and "--chat-template" in error["message"]


@with_client(skip_tokenizer=True, tokenizer=None)
async def test_a_server_without_a_tokenizer(client):
    assert "/v1/completions" in (await refusal(client))["message"]


# ---- refusals


BAD = {
    "no messages": ({"messages": []}, "messages"),
    "messages of another type": ({"messages": "Hi"}, "messages"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, "messages"),
    "null content of a custom role": ({"messages": [{"role": "pirate", "content": None}]}, "messages"),
    "no content": ({"messages": [{"role": "user"}]}, "messages"),
    "no role": ({"messages": [{"content": "Hi"}]}, "messages"),
    "role": ({"messages": [{"role": 5, "content": "Hi"}]}, "messages"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
    ),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    "template": ({"chat_template": CHAT_TEMPLATE}, "chat_template"),
    "nested template": ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    "documents": ({"documents": ["d"]}, "documents.0"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "prompt_logprobs in a stream": ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "functions": ({"functions": []}, "functions"),
    "max_completion_tokens": ({"max_completion_tokens": 257}, "max_completion_tokens"),
    "n": ({"n": 2000, "temperature": 1}, "n"),
    "priority": ({"priority": -1}, "priority"),
}


@pytest.mark.parametrize("name", BAD)
@with_client()
async def test_bad_requests_are_400_with_the_name_of_the_field(client, name):
    fields, param = BAD[name]
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, **fields}
    answer = await client.post(PATH, body)
    assert answer.status == 400 and answer.error["param"] == param, answer.error
    assert answer.error["type"] == "invalid_request_error" and "Traceback" not in answer.error["message"]


@with_client()
async def test_data_that_is_nested_deeply_is_400(client):
    """Python's JSON parser stops at some depth. What it lets through must not break what comes after it."""
    for depth, statuses in ((900, (200, 400)), (100_000, (400,))):
        for field in ("chat_template_kwargs", "messages", "metadata"):
            deep = '{"a":' * depth + "1" + "}" * depth
            value = f"[{deep}]" if field == "messages" else deep
            body = '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "' + field + f'": {value}' + "}"
            answer = await client.post(PATH, body.encode())
            assert answer.status in statuses, answer.error


@with_client()
async def test_another_model_is_404(client):
    answer = await client.chat("Hi", model="gpt-4")
    assert answer.status == 404 and answer.error["param"] == "model"


# ---- clients that leave


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "n": 3, "temperature": 1}])
@with_client(executor_factory=slow_executor)
async def test_a_client_that_leaves_frees_its_blocks(client, fields):
    leaving = asyncio.Event()
    body = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, **fields}
    call = asyncio.create_task(client.post(PATH, body, leaving=leaving))
    await eventually(lambda: client.engine.stats.num_running > 0)
    leaving.set()
    answer = await call
    assert client.engine.num_unfinished == 0 and b"[DONE]" not in b"".join(answer.pieces)


def test_the_template_of_the_helper_is_the_tokenizers():
    assert chat_tokenizer().apply_chat_template([{"role": "user", "content": "Hi"}]) == HI
