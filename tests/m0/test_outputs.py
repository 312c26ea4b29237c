"""What comes out has vLLM's fields, and what crosses between the parts of the engine is plain data."""

import dataclasses
import json
from typing import Any

import pytest

from folovllm.outputs import (
    CompletionOutput,
    EngineCoreOutput,
    EngineStats,
    Logprob,
    ModelRunnerOutput,
    RequestMetrics,
    RequestOutput,
)
from folovllm.request import TokenLogprobs

pytestmark = pytest.mark.m0

# vLLM's fields, less those of what FoloVLLM has not: LoRA, encoder-decoder models, KV transfer, images.
VLLM_FIELDS: dict[type, set[str]] = {
    RequestOutput: {
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
        "metrics",
        "num_cached_tokens",
    },
    CompletionOutput: {
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
    },
    Logprob: {"logprob", "rank", "decoded_token"},
}


def request_output(**changes: Any) -> RequestOutput:
    completion = CompletionOutput(index=0, text="hi", token_ids=[5, 6])
    values = {"request_id": "r", "prompt": "p", "prompt_token_ids": [1], "outputs": [completion], "finished": False}
    return RequestOutput(**values | changes)


@pytest.mark.parametrize("cls", VLLM_FIELDS, ids=lambda cls: cls.__name__)
def test_fields_are_vllms(cls: type) -> None:
    assert {field.name for field in dataclasses.fields(cls)} == VLLM_FIELDS[cls]


def test_what_was_not_asked_for_is_none() -> None:
    output = request_output()
    assert (output.prompt_logprobs, output.metrics, output.num_cached_tokens) == (None, None, None)
    completion = output.outputs[0]
    assert (completion.cumulative_logprob, completion.logprobs, completion.finish_reason, completion.stop_reason) == (
        (None,) * 4
    )
    assert (Logprob(-0.5).rank, Logprob(-0.5).decoded_token) == (None, None)


@pytest.mark.parametrize(("reason", "finished"), [(None, False), ("stop", True), ("length", True), ("abort", True)])
def test_a_finish_reason_means_finished(reason: str | None, finished: bool) -> None:
    assert CompletionOutput(0, "", [], finish_reason=reason).finished() is finished
    assert EngineCoreOutput("r", [], finish_reason=reason).finished is finished


def test_no_list_or_dict_is_shared_between_outputs() -> None:
    for make in (lambda: ModelRunnerOutput({}), lambda: RequestMetrics(0.0)):
        one, other = make(), make()
        for field in dataclasses.fields(one):
            value = getattr(one, field.name)
            if isinstance(value, (list, dict)) and field.default_factory is not dataclasses.MISSING:
                assert value is not getattr(other, field.name) and not value


def test_what_crosses_is_plain_data() -> None:
    """One message up per step must survive a pipe to another process, or a trace file."""
    logprobs = TokenLogprobs([5, 7], [-0.5, -1.5], rank=1)
    up = ModelRunnerOutput({"r": [5]}, logprobs={"r": [logprobs]})
    assert json.loads(json.dumps(dataclasses.asdict(up)))["sampled_token_ids"] == {"r": [5]}
    out = EngineCoreOutput("r", [5], finish_reason="stop", stop_reason="x", num_cached_tokens=3)
    assert json.loads(json.dumps(dataclasses.asdict(out)))["stop_reason"] == "x"


def test_statistics_are_a_snapshot() -> None:
    stats = EngineStats(**dict.fromkeys((field.name for field in dataclasses.fields(EngineStats)), 0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.num_running = 1  # type: ignore[misc]


def test_times_not_reached_yet_are_none() -> None:
    metrics = RequestMetrics(arrival_time=12.5)
    unknown = {f.name for f in dataclasses.fields(metrics) if getattr(metrics, f.name) is None}
    assert unknown == {
        "queue_time",
        "prefill_time",
        "decode_time",
        "inference_time",
        "time_to_first_token",
        "time_per_output_token",
        "e2e_latency",
    }
