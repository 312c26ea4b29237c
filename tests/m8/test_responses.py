"""/v1/responses: plain text in OpenAI's newer form."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.m1.tiny_tokenizers import byte_level
from tests.m8.server_process import RunningServer, running_server
from tests.m8.serving_helpers import assert_all_free, oracle

pytestmark = pytest.mark.m8

BODY = {"input": "the fox", "max_output_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running
        running.in_loop(lambda: assert_all_free(running.state.engine))


def expected_text(prompt: str, max_tokens: int) -> str:
    return byte_level().decode(oracle(byte_level().encode(prompt, add_special_tokens=False), max_tokens))


def test_an_answer_has_openais_form(server: RunningServer) -> None:
    response = server.post("/v1/responses", BODY | {"metadata": {"a": "b"}}).json
    (item,) = response["output"]
    (part,) = item["content"]
    assert part["type"] == "output_text" and part["text"] == expected_text("<|user|>user: the fox>", 6)
    assert (item["type"], item["role"]) == ("message", "assistant")
    assert response["object"] == "response" and response["id"].startswith("resp_") and item["id"].startswith("msg_")
    assert response["status"] == item["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    usage = response["usage"]
    assert usage["output_tokens"] == 6 and usage["total_tokens"] == usage["input_tokens"] + 6
    assert (response["metadata"], response["temperature"], response["tools"]) == ({"a": "b"}, 0.0, [])


def test_instructions_and_messages_become_a_conversation(server: RunningServer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}], "id": "msg_1"},
        {"role": "user", "content": "d"},
    ]
    answer = server.post("/v1/responses", BODY | {"input": messages, "instructions": "be short"}).json
    prompt = "<|user|>system: be short<|user|>user: a\nb<|user|>assistant: c<|user|>user: d>"
    assert answer["output"][0]["content"][0]["text"] == expected_text(prompt, 6)


def test_a_stream_has_the_events_in_order(server: RunningServer) -> None:
    answer = server.post("/v1/responses", BODY | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.events
    kinds = [event["type"] for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas >= 1 and kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    lines = [line.removeprefix("event: ") for line in answer.body.decode().splitlines() if line.startswith("event: ")]
    assert lines == kinds
    text = "".join(event["delta"] for event in events if "delta" in event)
    whole = server.post("/v1/responses", BODY).json
    assert text == events[-4]["text"] == whole["output"][0]["content"][0]["text"]
    last = events[-1]["response"]
    for changing in ("id", "created_at", "output", "usage"):
        last.pop(changing), whole.pop(changing)
    assert last == whole


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"input": None}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 2}, "n"),
        ({"documents": 5}, "documents"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"stop": ["a"]}, "stop"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_not_there_is_refused_by_its_name(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = server.post("/v1/responses", BODY | fields | {"stream": stream})
        assert answer.status == (404 if param == "model" else 400), answer.body
        assert answer.error["param"] == param


def test_fields_that_ask_for_nothing_are_accepted(server: RunningServer) -> None:
    fields = {
        "store": False,
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "include": None,
        "n": None,
        "unheard_of": 1,
    }
    answer = server.post("/v1/responses", BODY | fields)
    assert answer.status == 200, answer.body
