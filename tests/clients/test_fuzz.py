"""schemathesis sends what the server's own /openapi.json allows, and what it does not: no 500, and errors are JSON.

Milestone: M8. The random model is fast, so that most of the time goes into different requests. Bounded in the number
of examples and in time; the examples are the same in every run.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis

from tests.clients.server_process import ServerProcess, serve

pytestmark = [pytest.mark.m8, pytest.mark.slow]

SECONDS = 75  # for all routes together; what is not tried by then is left out
EXAMPLES = 60  # per route and kind of request
VALID = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 5},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 16},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5, 6, 7]},
}


@pytest.fixture(scope="module")
def fuzzed(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("fuzz") / "server.log"
    options = ["--max-model-len", "256", "--max-num-seqs", "16", "--scheduling-policy", "priority"]
    with serve(log, *options, model=tiny_model) as server:
        yield server
        assert "Traceback" not in server.log_text()


def test_no_route_answers_500(fuzzed: ServerProcess) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    operations.sort(key=lambda operation: operation.path in VALID)  # the large ones get the time that the others leave
    assert VALID.keys() <= {operation.path for operation in operations}
    deadline = time.monotonic() + SECONDS
    statuses: dict[str, Counter[int]] = {}
    for place, operation in enumerate(operations):
        share = (deadline - time.monotonic()) / (len(operations) - place)
        statuses[operation.label] = fuzz(operation, time.monotonic() + share)
    for operation in operations:
        answers = statuses[operation.label]
        assert answers, f"{operation.label} was not tried"
        if operation.path in VALID:
            assert answers[200] and answers[400], f"{operation.label}: {answers}"
    fuzzed.wait_until_idle()
    print("statuses per route:", {label: dict(counts) for label, counts in statuses.items()})


def fuzz(operation: schemathesis.APIOperation, deadline: float) -> Counter[int]:
    """Sends requests to one route until `deadline`. Returns how many answers had which status.

    Three kinds: a request that works with a few odd fields, what the schema allows, and what it does not.
    """
    statuses: Counter[int] = Counter()
    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    valid = VALID.get(operation.path)
    kinds = [(positive, valid)] if valid else []
    kinds += [(positive, None), (negative, None)]
    started = time.monotonic()
    for place, (mode, fields) in enumerate(kinds, 1):
        send_kind(operation, mode, fields, started + (deadline - started) * place / len(kinds), statuses)
    return statuses


def send_kind(
    operation: schemathesis.APIOperation,
    mode: schemathesis.GenerationMode,
    valid: dict[str, Any] | None,
    deadline: float,
    statuses: Counter[int],
) -> None:
    """Sends EXAMPLES requests of one kind; `valid`: the fields that make one work."""

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), count=hypothesis.strategies.integers(0, 4))
    def send(case: schemathesis.Case, count: int) -> None:
        if time.monotonic() > deadline:
            return
        if valid is not None and isinstance(case.body, dict):
            case.body = dict(list(case.body.items())[:count]) | valid
        response = case.call(timeout=30)
        statuses[response.status_code] += 1
        check(case, response)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # e.g. no request to /health breaks its schema
        send()


def check(case: schemathesis.Case, response: requests.Response) -> None:
    told = f"{case.as_curl_command()}\n{response.status_code} {response.text[:500]}"
    assert response.status_code < 500, told
    if response.status_code >= 400 and case.method.upper() != "HEAD":
        assert response.headers["content-type"][0].startswith("application/json"), told
        error = json.loads(response.content)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], told
        assert "Traceback" not in response.text and str(Path(__file__).parents[2]) not in response.text, told
