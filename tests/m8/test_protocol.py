"""The fields of a body: which are known, which are refused, and what the log says of the rest."""

import json
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from folovllm.entrypoints.openai import protocol
from folovllm.entrypoints.openai.errors import ApiError
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from folovllm.entrypoints.openai.refusals import MAX_LOGGED_FIELDS, REFUSALS, check_extra_fields

pytestmark = pytest.mark.m8

VLLM_FIELDS = json.loads((Path(__file__).parent / "data" / "vllm_request_fields.json").read_text())
MESSAGES = [{"role": "user", "content": "Hi"}]


def completion(**fields):
    return CompletionRequest.model_validate({"prompt": "Hi", **fields})


def chat(**fields):
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, **fields})


def refusal(body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        check_extra_fields(body, set())
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("name", ["CompletionRequest", "ChatCompletionRequest", "StreamOptions"])
def test_every_field_of_vllm_is_supported_or_refused_or_logged(name):
    """The file lists all fields of vLLM 0.11.0; none may be forgotten here."""
    ours = getattr(protocol, name).model_fields
    for field, status in VLLM_FIELDS[name].items():
        assert status == ("supported" if field in ours else "refused" if field in REFUSALS else "ignored"), field


@pytest.mark.parametrize("field", [field for field, status in VLLM_FIELDS["ChatCompletionRequest"].items()
                                   if status == "ignored"])  # fmt: skip
def test_what_is_ignored_is_in_the_log_once(field, caplog):
    logged: set[str] = set()
    with caplog.at_level(logging.WARNING):
        check_extra_fields(chat(**{field: 2}), logged)
        check_extra_fields(chat(**{field: 2}), logged)
    assert [field in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("field", REFUSALS)
@pytest.mark.parametrize("make", [completion, chat])
def test_a_refusal_names_the_field_and_what_to_do(field, make):
    error = refusal(make(**{field: {"type": "json_object"}}))
    assert error.param == field
    assert error.message == f"{field} is not supported: {REFUSALS[field].instead}"


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, refused in REFUSALS.items() for value in (None, *refused.off)]
    + [("best_of", 1), ("user", "me"), ("response_format", {"type": "text"})],
)
def test_a_field_that_asks_for_nothing_is_no_reason_to_refuse(field, value):
    check_extra_fields(completion(**{field: value}), set())


def test_best_of_may_equal_n_and_nothing_else():
    check_extra_fields(completion(best_of=3, n=3), set())
    assert refusal(completion(best_of=3)).param == "best_of"
    assert refusal(completion(best_of=1, n=2)).param == "best_of"


def test_the_log_does_not_grow_with_invented_names(caplog):
    logged: set[str] = set()
    for start in range(0, 3 * MAX_LOGGED_FIELDS, 500):
        check_extra_fields(completion(**{f"x{i}": 1 for i in range(start, start + 500)}), logged)
    check_extra_fields(completion(**{"line\nbreak" + "y" * 1000: 1}), set())
    assert len(logged) == MAX_LOGGED_FIELDS
    assert "\n" not in caplog.records[-1].getMessage() and len(caplog.records[-1].getMessage()) < 200


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("Hi", ["Hi"]), (["Hi", "you"], ["Hi", "you"]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]]), ("", [""])],
)
def test_all_forms_of_a_prompt(prompt, prompts):
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [None, [], [[]], [5, "Hi"], [[5], "Hi"], [5.0], [True], [None], {}, 5, [[5, None]]])
def test_other_prompts_are_refused_in_one_sentence(prompt):
    with pytest.raises(ValidationError) as caught:
        completion(prompt=prompt)
    (error,) = caught.value.errors()
    assert error["loc"] == ("prompt",) and "a list of token ids" in error["msg"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("top_p", float("inf")),
        ("temperature", 10**400),
        ("temperature", "warm"),
        ("logit_bias", {"5": float("inf")}),
        ("seed", 2**63),
        ("max_tokens", 10**4000),
        ("max_tokens", 1.5),
        ("priority", "high"),
        ("stop_token_ids", [1, "x"]),
        ("stream", "perhaps"),
        ("stream_options", {"include_usage": 7}),
    ],
)
def test_a_wrong_type_is_refused_under_the_name_of_its_field(field, value):
    with pytest.raises(ValidationError) as caught:
        completion(**{field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize("field", sorted(set(ChatCompletionRequest.model_fields) - {"messages"}))
def test_null_means_that_a_field_is_missing(field):
    check_extra_fields(chat(**{field: None}), set())


def test_what_means_the_same_is_converted():
    body = completion(max_tokens="5", temperature="0.5", n=2.0, stream=1)
    assert (body.max_tokens, body.temperature, body.n, body.stream) == (5, 0.5, 2, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "fields",
    [
        lambda x: {"tools": [{"function": {"parameters": {"maximum": x}}}]},
        lambda x: {"chat_template_kwargs": {"a": [x]}},
        lambda x: {"messages": [{"role": "user", "content": "Hi", "score": x}]},
        lambda x: {"unknown": x},
    ],
)
def test_numbers_without_a_type_must_be_finite_too(fields, value):
    (name,) = fields(value)
    error = refusal(chat(**fields(value)))
    assert error.param == name and "finite" in error.message


def test_deeply_nested_data_is_walked_without_recursion():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    check_extra_fields(chat(chat_template_kwargs={"deep": deep}), set())
