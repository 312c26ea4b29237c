"""The running example of the pages: the recorded answers are the model's, and every rung replays them."""

import json
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.learn.measured import step_parts
from folovllm.learn.three_requests import EXAMPLES, example_core, example_request, run_example, text_of
from tests.script_loader import load_script

pytestmark = pytest.mark.m0

FIRST_TOKENS = Path(__file__).parents[2] / "docs/data/first_tokens.json"
ENGINES = {
    "m1": {"block_size": 16, "max_num_seqs": 1, "batching": "static"},
    "m2": {"block_size": 16, "max_num_seqs": 2},
    "m3, c is preempted": {"num_kv_blocks": 7},
    "m5": {"enable_chunked_prefill": True, "max_num_batched_tokens": 6},
    "m6": {"enable_chunked_prefill": True, "max_num_batched_tokens": 6, "enable_prefix_caching": True},
}


@pytest.mark.parametrize("engine_args", ENGINES.values(), ids=ENGINES)
def test_every_rung_gives_the_recorded_answers(engine_args: dict) -> None:
    answers: dict[str, list[int]] = {name: [] for name in EXAMPLES}
    for step in run_example(example_core(**({"num_kv_blocks": 10} | engine_args))):
        for name, tokens in step.sampled.items():
            answers[name] += tokens
        assert str(step).startswith(f"step {step.number}: ")
    assert answers == {name: list(e.answer_token_ids[: e.max_tokens]) for name, e in EXAMPLES.items()}


def test_c_continues_the_conversation_of_a() -> None:
    a, c = EXAMPLES["a"], EXAMPLES["c"]
    assert c.prompt_token_ids[:7] == (*a.prompt_token_ids, *a.answer_token_ids[:2])
    core = example_core(num_kv_blocks=10, enable_prefix_caching=True)
    steps = list(run_example(core))
    assert steps[2].hits["c"] == 4 and steps[2].blocks["c"][0] == steps[2].blocks["a"][0]


def test_printed_steps_name_what_happened() -> None:
    steps = [str(step) for step in run_example(example_core(num_kv_blocks=7))]
    assert steps[2].endswith("c waits")
    assert steps[4].endswith("c positions 0-11 in blocks [2, 1, 5] -> ' Rome'")
    assert steps[5].endswith("c preempted")


def test_wrong_names_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="there are a, b, c"):
        example_request("d")
    with pytest.raises(ValueError, match="at most 8"):
        example_request("a", max_tokens=9)


@pytest.mark.weights
def test_the_model_gives_these_tokens() -> None:
    llm = LLM("smollm2-135m", dtype="float32")
    for name, example in EXAMPLES.items():
        params = SamplingParams(temperature=0, max_tokens=len(example.answer_token_ids), ignore_eos=True)
        output = llm.generate([example.text], params, use_tqdm=False)[0]
        assert tuple(output.prompt_token_ids) == example.prompt_token_ids, name
        assert tuple(output.outputs[0].token_ids) == example.answer_token_ids, name
        assert text_of(example.prompt_token_ids) == example.text
        assert text_of(example.answer_token_ids) == output.outputs[0].text


# ---- the probabilities and attention weights in the pictures of docs/learn/00 and 01


def close(first: Any, second: Any) -> bool:
    """Whether two records are equal up to 0.001 in their numbers: another CPU adds in another order."""
    if isinstance(first, float) or isinstance(second, float):
        return abs(first - second) < 1e-3
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(close(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)


def test_the_recorded_probabilities_belong_to_the_answers() -> None:
    recorded = json.loads(FIRST_TOKENS.read_text(encoding="utf-8"))["next_tokens"]
    for name, example in EXAMPLES.items():
        best = [recorded[f"{name}{index}"][0][0] for index in range(example.max_tokens)]
        assert best == list(example.answer_pieces[: example.max_tokens])


@pytest.mark.weights
def test_the_recorded_probabilities_are_the_models() -> None:
    recorded = json.loads(FIRST_TOKENS.read_text(encoding="utf-8"))
    assert close(load_script("record_first_tokens").record(), recorded)


def test_the_parts_of_a_measured_step_add_up() -> None:
    """learn/02 prints them: the linears share the weights of 32 requests, attention shares nothing."""
    one, many = (step_parts("plain torch", num_requests) for num_requests in (1, 32))
    for parts in (one, many):
        assert parts["step"] == pytest.approx(parts["linears"] + parts["attention"] + parts["rest"])
        assert parts["rest"] > 0
    assert many["linears"] < 3 * one["linears"] and many["attention"] > 20 * one["attention"]
    assert step_parts("fast kernels", 32)["step"] < many["step"] / 3
