"""Every field of both APIs at every odd value: an answer or a clean refusal, and never a fault of the server."""

import json

import pytest

from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from folovllm.entrypoints.openai.refusals import REFUSALS
from tests.m8.api_helpers import with_client

pytestmark = pytest.mark.m8

VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**100, 0.5, -0.0, 1e-320, 1e308),
    *("", "x", "5", "\x00", "\ud800", "é" * 300, [], {}, [None], [[]], [0], ["x"], [""], [True], [1.5], [2**70]),
    *({"": None}, {"a": 1}, {"5": 1}, {"5": None}, {"-1": 1}, {"type": "text"}, [{}], [{"role": "user"}]),
    *([{"role": "user", "content": {}}], [{"role": None, "content": "x"}], [{"function": {"name": "\ud800"}}]),
]
BODIES = {
    "/v1/completions": (CompletionRequest, {"prompt": [5, 6]}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
}


@pytest.mark.parametrize("path", BODIES)
@with_client()
async def test_no_value_is_a_fault(client, path):
    request, minimal = BODIES[path]
    for field in [*request.model_fields, *REFUSALS, "something_else"]:
        for number, value in enumerate(VALUES):
            body = {"max_tokens": 2, "stream": number % 2 == 0, **minimal, field: value}
            answer = await client.post(path, body)
            assert answer.status in (200, 400, 404), (field, value)
            if answer.status != 200:
                error = answer.error
                assert isinstance(error["message"], str) and "http" not in error["message"], (field, value)
                assert len(error["message"]) < 1000, (field, value)
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert not any("error" in chunk for chunk in answer.chunks), (field, value)
            else:
                assert answer.json["choices"], (field, value)


@pytest.mark.parametrize("number", ["NaN", "-1e999"])
@pytest.mark.parametrize("path", BODIES)
@with_client()
async def test_numbers_that_are_none(client, path, number):
    """Python's JSON parser takes them, also where no field has a type."""
    request, minimal = BODIES[path]
    for field in [*request.model_fields, "something_else"]:
        for form in ("%s", "[%s]", '{"5": %s}', '[{"role": "user", "content": "x", "a": [%s]}]'):
            body = json.dumps({**minimal, "max_tokens": 2, field: None})
            body = body.replace(f'"{field}": null', f'"{field}": ' + form % number)
            answer = await client.post(path, body.encode())
            assert answer.status == 400, (field, form)
