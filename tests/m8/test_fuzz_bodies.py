"""Bodies that no client sends: whatever they hold, the answer is a clean one, and nothing stays in the engine."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.m8.server_process import RunningServer, running_server
from tests.m8.serving_helpers import assert_all_free

pytestmark = pytest.mark.m8

MESSAGES = [{"role": "user", "content": "hi"}]
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the fox", "max_tokens": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"input": "the fox", "max_output_tokens": 2},
    "/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [1, 2]},
}
SMALL = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([-1, 0, 1, 2**31, 2**63])
)
VALUES = st.recursive(
    SMALL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running
        running.in_loop(lambda: assert_all_free(running.state.engine))


@pytest.fixture(scope="module")
def fields(server: RunningServer) -> dict[str, list[str]]:
    """The fields of each body, from the server's own schema, and some that belong to another one."""
    schema = server.get("/openapi.json").json
    found = {}
    for path in VALID:
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        own = schema["components"]["schemas"][body.rpartition("/")[2]]["properties"]
        found[path] = sorted({*own, "n", "stop", "documents", "logprobs", "response_format", "tools"})
    return found


@pytest.mark.parametrize("path", VALID)
@settings(max_examples=60)
@given(data=st.data())
def test_no_body_is_a_500(server: RunningServer, fields: dict[str, list[str]], path: str, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(fields[path]), VALUES, min_size=1, max_size=3))
    answer = server.post(path, json.dumps(VALID[path] | changes).encode())
    assert answer.status in (200, 400, 404), (changes, answer.body)
    if answer.status != 200:
        assert answer.error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert not [event for event in answer.events if event.get("error")], (changes, answer.body)
