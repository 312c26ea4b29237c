"""Requests that are small for the client and could be large for the server, and requests that find a way round a check.

In each the event loop, the memory or the key was at stake. Nothing here measures time: what is tested is the bound.
"""

import asyncio
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.chat.options import check_variables
from folovllm.engine.input_processor import InputProcessor
from folovllm.entrypoints.openai import state
from folovllm.entrypoints.openai.generation import Generation
from folovllm.entrypoints.openai.listen import bind
from folovllm.entrypoints.openai.refusals import _is_finite
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.state import ServerState
from folovllm.sampling_params import SamplingParams
from tests.m1.tiny_tokenizers import byte_level
from tests.m8 import server_process
from tests.m8.api_helpers import Client, with_client
from tests.m8.server_process import running_server

pytestmark = pytest.mark.m8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bad_words", ["word"] * 1001),
        ("bad_words", ["word " * 2001]),  # 20,000 words took a minute, in which no other stream moved
        ("stop", "x" * 10_001),
        ("stop", ["x" * 5_000] * 3),
        ("cache_salt", "x" * 10_001),  # 1,024 prompts with a salt of 10 MB were 10 GB on their way to the engine
        ("allowed_token_ids", [5] * (2**18 + 1)),
        ("stop_token_ids", [5] * (2**18 + 1)),
    ],
)
@with_client()
async def test_a_field_that_is_too_large_is_refused(client: Client, name: str, value: Any) -> None:
    for answer in (await client.complete(prompt="Hi", **{name: value}), await client.chat(**{name: value})):
        assert (answer.status, answer.error["param"]) == (400, name)
        assert len(answer.error["message"]) < 200


@with_client()
async def test_what_each_completion_copies_is_counted_for_each(client: Client) -> None:
    bias = {str(i): 1 for i in range(300)}
    answer = await client.complete(prompt=["Hi"] * 1000, logit_bias=bias)
    assert (answer.status, answer.error["param"]) == (400, "logit_bias")
    assert (await client.complete(prompt=["Hi"] * 2, max_tokens=1, logit_bias=bias)).status == 200


def test_bad_words_are_tokenised_once_for_the_prompts_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = InputProcessor(byte_level(), vocab_size=420, max_model_len=100)
    calls: list[str] = []
    spell = processor._spellings

    def counted(word: str) -> list[list[int]]:
        calls.append(word)
        return spell(word)

    monkeypatch.setattr(processor, "_spellings", counted)
    params = SamplingParams(bad_words=["ab", "cd", "ab"])
    spellings = [processor.process(str(i), [5], params).bad_words_token_ids for i in range(3)]
    assert calls == ["ab", "cd", "ab"] and spellings[0] == spellings[2] and len(spellings[0]) == 4
    other = processor.process("x", [5], SamplingParams(bad_words=["ab"])).bad_words_token_ids
    assert other == spellings[0][:2]


@with_client()
async def test_other_streams_have_their_turn_between_two_prompts(client: Client) -> None:
    """1,024 prompts of one request held up every stream for as long as they took to tokenise."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    assert (await client.complete(prompt=["Hi"] * 50, max_tokens=1)).status == 200
    counter.cancel()
    assert turns >= 100  # once when a prompt is tokenised, and once when it is added


@with_client()
async def test_a_conversation_of_many_empty_messages_is_refused(client: Client) -> None:
    """50,000 tool calls took half a minute to render, and two such requests all threads that tokenise."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    for messages in (
        [{"role": "user", "content": ""}] * 257,
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 256}],
        [{"role": "assistant", "tool_calls": [call] * 256}],
    ):
        for answer in (await client.chat(messages), await client.post("/tokenize", {"messages": messages})):
            assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


@with_client()
async def test_a_text_that_is_truncated_has_a_limit_too(client: Client) -> None:
    answer = await client.complete(prompt="x" * 4_000_001, max_tokens=1, truncate_prompt_tokens=5)
    assert answer.status == 400 and "truncate_prompt_tokens" not in answer.error["message"]
    assert (await client.post("/tokenize", {"prompt": "x" * 4_000_001})).status == 400
    assert (await client.post("/detokenize", {"tokens": [5] * 200_001})).status == 400


@with_client()
async def test_a_response_to_a_message_without_content(client: Client) -> None:
    for item in ({"role": "user"}, {"role": "user", "content": None}):
        answer = await client.post("/v1/responses", {"input": [item], "max_output_tokens": 1})
        assert answer.status == 400 and answer.error["param"] == "input"


@pytest.mark.parametrize("prompt", [[-1], [400], [10**12], [10**30]])
@with_client()
async def test_echo_of_a_token_that_does_not_exist(client: Client, prompt: list[int]) -> None:
    """The tokenizer raises OverflowError for such ids."""
    for more in ({}, {"echo": True}):
        answer = await client.complete(prompt=prompt, **more)
        assert answer.status == 400 and "out of vocabulary" in answer.error["message"]


@with_client()
async def test_an_answer_repeats_half_a_surrogate_pair(client: Client) -> None:
    """Such a string has no UTF-8 form, but JSON has an escape for it. The answer broke off."""
    odd = "a\ud800"
    body: dict[str, Any] = {"input": "Hi", "max_output_tokens": 1, "metadata": {"key": odd}, "user": odd}
    answer = await client.post("/v1/responses", body)
    assert (answer.status, answer.json["metadata"]["key"], answer.json["user"]) == (200, odd, odd)
    answer = await client.post("/v1/responses", {**body, "stream": True})
    assert json.loads(answer.events[-1])["response"]["user"] == odd


@with_client()
async def test_a_value_error_of_our_own_is_an_internal_error(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def results(self: Generation) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr(Generation, "results", results)
    for answer in (
        await client.complete(prompt="Hi"),
        await client.chat(),
        await client.post("/v1/responses", {"input": "Hi"}),
    ):
        assert answer.status == 500 and "zip" not in answer.error["message"]


@with_client()
async def test_bad_input_of_tokenize_is_no_internal_error(client: Client) -> None:
    bodies: tuple[dict[str, Any], ...] = (
        {"prompt": "\ud800"},
        {"messages": []},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": "\ud800"}], "add_special_tokens": True},
    )
    for body in bodies:
        answer = await client.post("/tokenize", body)
        assert answer.status == 400 and answer.error["param"] in ("prompt", "messages")


def test_numbers_are_checked_at_any_depth() -> None:
    assert _is_finite([1, "a", None, [2.0, {"a": [3]}], True])
    for value in (float("nan"), [1, float("inf")], {"a": [{"b": [-float("inf")]}]}, [[[[float("nan")]]]]):
        assert not _is_finite(value)


def test_names_that_a_template_does_not_read_fill_one_line(caplog: pytest.LogCaptureFixture) -> None:
    names = {f"name{i}" + "x" * 1000: 1 for i in range(1000)}
    with caplog.at_level(logging.WARNING):
        check_variables(names, frozenset(), names)
    assert len(caplog.records) == 1 and len(caplog.messages[0]) < 1000 and "name4" in caplog.messages[0]


def test_a_client_that_sends_too_large_a_body_can_read_why() -> None:
    """The connection was closed while the client was still sending, and it saw a broken pipe."""
    with running_server(max_body_size=2**20) as server:
        for _ in range(3):
            assert server.post("/v1/completions", b"x" * (4 * 2**20)).status == 413


# ---- the key and the address


@pytest.mark.parametrize("root_path", ["/v", "/v1", "/v1/mo", "/llm", ""])
def test_the_key_is_needed_whatever_the_root_path(root_path: str) -> None:
    """The part of --root-path was cut off a path before the look-up, and the router does not always do so."""
    with running_server(api_key=("secret",), root_path=root_path) as server:
        for path in ("/v1/models", f"{root_path}/v1/models"):
            assert server.get(path).status in (401, 404)
        good = {
            server.get(path, Authorization="Bearer secret").status for path in ("/v1/models", f"{root_path}/v1/models")
        }
        assert 200 in good


@pytest.mark.parametrize("root_path", ["/", "v", "/v/"])
def test_a_root_path_has_one_form(root_path: str) -> None:
    with pytest.raises(ValueError, match="root_path must begin with a slash"):
        ServerOptions(root_path=root_path)


@pytest.mark.parametrize("uds", ["", ".", "/"])
def test_a_socket_file_has_a_name(uds: str) -> None:
    with pytest.raises(ValueError, match="uds must be the path of a file"):
        ServerOptions(uds=uds)


def test_a_socket_file_belongs_to_one_server_while_it_starts(tmp_path: Path) -> None:
    """While the model is loaded the socket does not listen: a second server took its place and both went on."""
    options = ServerOptions(uds=str(tmp_path / "s"))
    with bind(options):
        with pytest.raises(ValueError, match="or is about to"), bind(options):
            pass
        assert (tmp_path / "s").is_socket()
    assert list(tmp_path.iterdir()) == []
    with bind(options):
        pass


def test_a_port_that_another_server_has_begun_to_listen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers that start at the same time can both bind a port, and only one can listen."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))  # and does not listen yet
        port = other.getsockname()[1]

        def make_state(*arguments: Any) -> ServerState:
            other.listen()
            return state.make_state(*arguments)

        monkeypatch.setattr(server_process, "make_state", make_state)
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is in use"), running_server(port=port):
            pass
