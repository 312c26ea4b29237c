"""OpenAIClient against a server double: streams in any cut, every kind of failure, and what its messages say."""

import asyncio
import contextlib
import socket

import pytest

from folovllm.entrypoints.openai_client import OpenAIClient, ServerError, base_url, error_text
from tests.m8.openai_double import DONE, chunk, event, running_double

pytestmark = pytest.mark.m8


@pytest.fixture
def double():
    with running_double() as double:
        yield double


def with_client(url, use, **args):
    """Runs `await use(client)` on a client of `url`."""

    async def main():
        async with OpenAIClient(url, **args) as client:
            return await use(client)

    return asyncio.run(main())


def stream(double, **args):
    async def use(client):
        return [event async for event in client.stream_chat("tiny", [{"role": "user", "content": "hi"}])]

    return with_client(double.url, use, **args)


@pytest.mark.parametrize(
    "url, wanted",
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        (" http://127.0.0.1:8000/v1/ ", "http://127.0.0.1:8000/v1"),
        ("localhost:8000", "http://localhost:8000/v1"),
        ("https://example.org/openai", "https://example.org/openai/v1"),
        ("https://example.org/api/v3", "https://example.org/api/v3"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_the_url_may_end_with_v1_or_not(url, wanted):
    assert base_url(url) == wanted


@pytest.mark.parametrize("url", ["", "http://", "ftp://host", "http://host:port", "http://host:70000", "http://h?a=b"])
def test_what_is_no_url_is_refused_with_an_example(url):
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:8000"):
        base_url(url)


def test_without_a_server_the_message_names_the_url_and_the_command_that_starts_one():
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError) as caught:
            with_client(url, lambda client: client.models())
    assert url in str(caught.value) and "folovllm serve" in str(caught.value) and caught.value.status is None


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_a_stream_arrives_whole_however_it_is_cut(double, cut):
    double.answer = lambda body: [chunk("你好"), ": a comment\r\n\r\n", chunk(" 😀\u2028"), chunk("", "stop"), DONE]
    double.cut = cut
    events = stream(double)
    assert [e["choices"][0]["delta"]["content"] for e in events] == ["你好", " 😀\u2028", ""]


def test_a_request_carries_the_key_and_asks_for_a_stream(double):
    double.answer = lambda body: [DONE]
    assert stream(double, api_key="secret") == []
    path, body, headers = double.calls[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    double.calls.clear()
    stream(double)
    assert "Authorization" not in double.calls[0][2]


@pytest.mark.parametrize(
    "status, content, wanted",
    [
        (
            400,
            {"error": {"message": "top_p must be below 1", "type": "x", "param": "top_p", "code": 400}},
            "top_p must",
        ),
        (404, {"object": "error", "message": "no model 'a'", "code": 404}, "no model 'a'"),
        (422, {"detail": "field required"}, "field required"),
        (401, {"error": "Unauthorized"}, "--api-key"),
        (404, "<html>nginx</html>", "address of an OpenAI API"),
        (502, "", "502"),
        (500, {"error": {}}, "500"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_an_errors_message_is_shown(double, status, content, wanted, streamed):
    double.answer = lambda body: (status, content)
    with pytest.raises(ServerError) as caught:
        if streamed:
            stream(double)
        else:
            with_client(double.url, lambda client: client.post("/completions", {"prompt": "a"}))
    assert wanted in str(caught.value) and str(status) in str(caught.value) and caught.value.status == status


def test_a_long_page_of_a_proxy_is_cut():
    assert len(error_text("x " * 5000)) < 400
    assert error_text({"error": {"message": "a\n  b"}}) == "a b"


def test_an_error_in_mid_stream_is_raised_after_the_text_before_it(double):
    double.answer = lambda body: [chunk("a"), event(error={"message": "the request failed"}), DONE]
    got = []

    async def use(client):
        async for one in client.stream_completion("tiny", "a"):
            got.append(one)

    with pytest.raises(ServerError, match="the request failed"):
        with_client(double.url, use)
    assert len(got) == 1


@pytest.mark.parametrize("drop", [True, False])
def test_an_answer_that_breaks_off_is_an_error_not_an_end(double, drop):
    """A client that takes the end of the connection for the end of the answer shows half an answer as a whole one."""
    double.answer = lambda body: [chunk("half an ans")]
    double.drop = drop
    with pytest.raises(ServerError, match="broke"):
        stream(double)


def test_a_server_may_leave_out_done_after_the_finish_reason(double):
    double.answer = lambda body: [chunk("a"), chunk("", "length")]
    assert len(stream(double)) == 2


@pytest.mark.parametrize("data", ["data: {\n\n", "data: 5\n\n", "data: []\n\n"])
def test_what_is_no_json_object_is_an_error(double, data):
    double.answer = lambda body: [data, DONE]
    with pytest.raises(ServerError):
        stream(double)


def test_leaving_a_stream_closes_its_connection(double):
    double.answer = lambda body: [chunk("a"), chunk("b")]
    double.hang = True

    async def use(client):
        async with contextlib.aclosing(client.stream_completion("tiny", "a")) as events:
            async for _ in events:
                break
        for _ in range(100):  # the server sees it at its next write
            if double.num_left:
                return
            await asyncio.sleep(0.05)

    with_client(double.url, use)
    assert double.num_left == 1


def test_the_card_of_a_model(double):
    double.models = [{"id": "a", "max_model_len": 10}, {"id": "b"}]
    assert with_client(double.url, lambda client: client.model_card())["id"] == "a"
    assert with_client(double.url, lambda client: client.model_card("b")) == {"id": "b"}
    with pytest.raises(ServerError, match="it serves 'a', 'b'"):
        with_client(double.url, lambda client: client.model_card("c"))
    double.models = []
    with pytest.raises(ServerError, match="none"):
        with_client(double.url, lambda client: client.model_card())


def test_the_length_of_a_conversation_where_the_server_knows_it(double):
    messages = [{"role": "user", "content": "12345"}]
    assert with_client(double.url + "/v1", lambda client: client.count_tokens("tiny", messages)) == 5
    double.count = None
    assert with_client(double.url, lambda client: client.count_tokens("tiny", messages)) is None


def test_many_requests_at_once_are_not_held_back(double):
    """aiohttp opens at most 100 connections unless told otherwise; the rest would wait in the client, unseen."""
    double.answer, double.hang = lambda body: [chunk("a")], True

    async def use(client):
        async def first():
            async with contextlib.aclosing(client.stream_completion("tiny", "a")) as events:
                await anext(events)
                while double.most_open < 120 and double.num_open:  # the double ends a stream after a minute
                    await asyncio.sleep(0.01)

        await asyncio.gather(*[first() for _ in range(120)])

    with_client(double.url, use)
    assert double.most_open == 120
