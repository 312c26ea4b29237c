"""Traces of a pipeline: one record per started step, tokens in later records, and a lint that still finds bugs."""

import copy
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.core import EngineCore
from folovllm.engine.core_loop import EngineCoreLoop
from folovllm.engine.messages import AddRequests, Call, DownMessage, StepOutputs, Stop
from folovllm.trace.lint import lint
from folovllm.trace.record import Trace, read_trace
from tests import core_helpers as helpers
from tests.core_helpers import make_request
from tests.m9.pipeline_helpers import pipeline_core

pytestmark = pytest.mark.m9


def traced(path: Path, num_stages: int = 2, **args: Any) -> EngineCore:
    core, _ = pipeline_core(num_stages, trace=str(path), **args)
    return core


def four_requests() -> list[Any]:
    return [make_request(name, 3, max_tokens=3) for name in "abcd"]


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """Four requests of three tokens, two stages."""
    core = traced(tmp_path / "trace.jsonl")
    helpers.add_all(core, four_requests())
    helpers.drive(core)
    core.shutdown()
    return read_trace(tmp_path / "trace.jsonl")


def scheduled(record: Any) -> str:
    return "".join(entry["req"] for entry in record["sched"])


def sampled(record: Any) -> str:
    return "".join(event[1] for event in record["events"] if event[0] == "sample")


def rules(trace: Trace) -> set[str]:
    return {violation.rule for violation in lint(trace)}


def test_a_record_has_the_step_that_started_and_the_tokens_that_came(trace: Trace) -> None:
    """The last record belongs to no started step: it ends what was in flight."""
    assert [(scheduled(record), sampled(record)) for record in trace.steps] == [
        ("ab", ""), ("cd", "ab"), ("ab", "cd"), ("cd", "ab"), ("ab", "cd"), ("cd", "ab"), ("", "cd"),
    ]  # fmt: skip
    assert [record["step"] for record in trace.steps] == list(range(7)) and not lint(trace)


def test_the_lint_misses_a_token_that_never_comes(trace: Trace) -> None:
    broken = copy.deepcopy(trace)
    for record in broken.steps[1:]:
        record["events"] = [event for event in record["events"] if event[1] != "a"]
    assert "no-token" in rules(broken)


def test_the_lint_finds_a_token_before_its_step(trace: Trace) -> None:
    broken = copy.deepcopy(trace)
    (token,) = [event for event in broken.steps[1]["events"] if event[:2] == ["sample", "b"]]
    broken.steps[0]["events"].insert(broken.steps[0]["planned"], ["sample", "c", token[2]])
    assert "early-token" in rules(broken)


def test_the_lint_finds_a_request_that_was_passed_over_although_its_token_had_come(trace: Trace) -> None:
    broken = copy.deepcopy(trace)
    broken.steps[2]["sched"] = broken.steps[2]["sched"][1:]
    broken.steps[2]["budget"]["used"] = 1
    assert "running-first" in rules(broken)


def test_the_lint_finds_a_pipeline_that_stands_still(trace: Trace) -> None:
    broken = copy.deepcopy(trace)
    empty = {**copy.deepcopy(broken.steps[-1]), "events": [], "queues": {"num_waiting": 0, "running": ["a", "b"]}}
    broken.steps[3:] = [{**copy.deepcopy(empty), "step": i} for i in range(3, 8)]
    assert "progress" in rules(broken)


def test_a_failure_with_steps_in_flight_is_told(tmp_path: Path) -> None:
    """All requests that ran are put back, also those of the other step."""
    core = traced(tmp_path / "trace.jsonl")
    requests = four_requests()
    helpers.add_all(core, requests)
    core.step()
    core.executor.fault = lambda output, stage: "c" in output.num_scheduled_tokens  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):
        core.step(blamed={"c"})
    core.executor.fault = lambda output, stage: False  # type: ignore[attr-defined]
    helpers.drive(core)
    core.shutdown()
    trace = read_trace(tmp_path / "trace.jsonl")
    assert not lint(trace)
    events = [event[:2] for record in trace.steps for event in record["events"]]
    assert [event for event in events if event[0] == "requeue"] == [["requeue", name] for name in "dba"]


class Script:
    """An inbox that gives one list of messages per step, then stops the loop when it is idle."""

    def __init__(self, *batches: list[DownMessage]) -> None:
        self.batches = list(batches)

    def take(self, wait: bool, timeout: float | None = None) -> list[DownMessage]:
        return self.batches.pop(0) if self.batches else [Stop()] if wait else []


def test_a_watcher_that_comes_while_steps_are_in_flight() -> None:
    """It gets a snapshot, and then every record, with rising numbers, also of steps that only end."""
    core, _ = pipeline_core(3)
    sent: list[Any] = []
    batches: list[list[DownMessage]] = [[AddRequests(four_requests())], [], [Call(1, "watch")], [], [Call(2, "watch")]]
    EngineCoreLoop(core, Script(*batches), sent.append).run()
    lines = [line for message in sent if isinstance(message, StepOutputs) for line in message.records]
    assert [line.get("type") for line in lines].count("snapshot") == 2
    numbers = [line["step"] for line in lines if "type" not in line]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    finished = [event[1] for line in lines if "events" in line for event in line["events"] if event[0] == "finish"]
    assert sorted(finished) == ["a", "b", "c", "d"]
