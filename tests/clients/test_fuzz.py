"""schemathesis sends what the server's own /openapi.json allows, and what it does not: no 500, and errors are JSON.

Milestone: M8. The random model is fast, so that most of the time goes into different requests. Bounded in the number
of examples and in time; the examples are the same in every run.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import requests
import schemathesis

from tests.clients.server_process import ServerProcess, serve

pytestmark = [pytest.mark.m8, pytest.mark.slow]

SECONDS = 75  # for all routes together; what is not tried by then is left out
EXAMPLES = 60  # per route


@pytest.fixture(scope="module")
def fuzzed(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("fuzz") / "server.log"
    with serve(log, "--max-model-len", "256", "--max-num-seqs", "16", model=tiny_model) as server:
        yield server
        assert "Traceback" not in server.log_text()


def test_no_route_answers_500(fuzzed: ServerProcess) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 8
    deadline = time.monotonic() + SECONDS
    counts: dict[str, int] = {}
    for place, operation in enumerate(operations):
        share = (deadline - time.monotonic()) / (len(operations) - place)
        counts[operation.label] = fuzz(operation, time.monotonic() + share)
    assert all(counts.values()), counts
    fuzzed.wait_until_idle()
    print(f"examples per route: {counts}")


def fuzz(operation: schemathesis.APIOperation, deadline: float) -> int:
    """Number of requests sent to one route. Every second strategy makes requests that break the schema."""
    count = 0
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

        @hypothesis.settings(
            max_examples=EXAMPLES // 2,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def send(case: schemathesis.Case) -> None:
            nonlocal count
            if time.monotonic() > deadline:
                return
            count += 1
            response = case.call(timeout=30)
            check(case, response)

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # e.g. no request to /health breaks its schema
            send()
    return count


def check(case: schemathesis.Case, response: requests.Response) -> None:
    told = f"{case.as_curl_command()}\n{response.status_code} {response.text[:500]}"
    assert response.status_code < 500, told
    if response.status_code >= 400 and case.method.upper() != "HEAD":
        assert response.headers["content-type"][0].startswith("application/json"), told
        error = json.loads(response.content)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], told
        assert "Traceback" not in response.text and str(Path(__file__).parents[2]) not in response.text, told
