"""From the fields of a body to SamplingParams: nothing gets lost, and what is wrong is refused under its own name."""

import dataclasses

import pytest

from folovllm.entrypoints.openai.errors import ApiError
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from folovllm.entrypoints.openai.sampling import as_bad_request, chat_params, check_stream_fields, completion_params
from folovllm.sampling_params import RequestOutputKind, SamplingParams

pytestmark = pytest.mark.m8

MAX_MODEL_LEN = 64
VALUES = {  # a value for every field that both a body and SamplingParams have
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.25,
    "temperature": 0.75,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.25,
    "seed": 11,
    "stop": ["a", "b"],
    "stop_token_ids": [3],
    "bad_words": ["c"],
    "ignore_eos": True,
    "max_tokens": 9,
    "min_tokens": 2,
    "prompt_logprobs": 3,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
    "allowed_token_ids": [1, 2],
}


def completion(defaults=None, **fields) -> SamplingParams:
    body = CompletionRequest.model_validate({"prompt": "Hi", **fields})
    return completion_params(body, defaults or {}, MAX_MODEL_LEN)


def chat(defaults=None, **fields) -> SamplingParams:
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], **fields})
    return chat_params(body, defaults or {}, MAX_MODEL_LEN)


def refusal(make, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("field", VALUES)
def test_a_field_arrives_and_changes_nothing_else(make, field):
    plain = make()
    changed = make(**{field: VALUES[field]})
    assert getattr(changed, field) == VALUES[field] != getattr(plain, field)
    assert dataclasses.replace(changed, **{field: getattr(plain, field)}) == plain


def test_no_field_of_sampling_params_is_out_of_reach():
    """`detokenize` and `output_kind` are the API's business, and the other three have tests of their own."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - set(VALUES) == {"detokenize", "output_kind", "logprobs", "logit_bias"}


def test_defaults_are_vllms():
    assert completion() == SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)  # 16 tokens
    assert chat() == SamplingParams(max_tokens=None, output_kind=RequestOutputKind.FINAL_ONLY)
    assert completion(max_tokens=None).max_tokens == 16
    assert completion(stream=True).output_kind is RequestOutputKind.DELTA


def test_the_models_defaults_hold_where_the_request_says_nothing():
    defaults = {"temperature": 0.6, "top_k": 20, "max_tokens": 8}
    assert dataclasses.astuple(completion(defaults)) == dataclasses.astuple(
        completion(temperature=0.6, top_k=20, max_tokens=8)
    )
    assert chat(defaults).max_tokens == 8
    assert chat(defaults, temperature=None).temperature == 0.6
    changed = chat(defaults, temperature=0, top_k=0, max_tokens=12)
    assert (changed.temperature, changed.top_k, changed.max_tokens) == (0.0, 0, 12)


def test_max_completion_tokens_is_the_newer_name():
    assert chat(max_completion_tokens=3).max_tokens == 3
    assert chat(max_completion_tokens=3, max_tokens=9).max_tokens == 3
    assert refusal(chat, max_completion_tokens=0, max_tokens=9).param == "max_completion_tokens"


@pytest.mark.parametrize("make", [completion, chat])
def test_max_tokens_has_bounds(make):
    assert make(max_tokens=MAX_MODEL_LEN).max_tokens == MAX_MODEL_LEN
    error = refusal(make, max_tokens=MAX_MODEL_LEN + 1)
    assert error.param == "max_tokens" and "65" in error.message and "64" in error.message
    assert refusal(make, max_tokens=0).message == "max_tokens must be at least 1, got 0"
    assert refusal(make, max_tokens=-3).param == "max_tokens"


def test_echo_allows_no_tokens_and_one_is_computed():
    assert completion(max_tokens=0, echo=True).max_tokens == 1
    assert refusal(chat, max_tokens=0, echo=True).param == "max_tokens"


def test_logprobs_of_a_completion():
    assert completion(logprobs=0).logprobs == 0
    assert completion(logprobs=4).prompt_logprobs is None
    assert completion(logprobs=4, echo=True).prompt_logprobs == 4
    assert completion(logprobs=4, echo=True, prompt_logprobs=1).prompt_logprobs == 1
    assert completion(echo=True).prompt_logprobs is None
    assert chat(logprobs=True, top_logprobs=4, echo=True).prompt_logprobs == 4
    assert chat(logprobs=True, echo=True).prompt_logprobs == 0
    assert chat(echo=True).prompt_logprobs is chat(logprobs=True, echo=True, stream=True).prompt_logprobs is None


def test_logprobs_of_a_chat():
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).logprobs == 4
    assert chat(logprobs=False, top_logprobs=0).logprobs is None
    assert refusal(chat, top_logprobs=4).param == "top_logprobs"
    assert refusal(chat, top_logprobs=4, logprobs=False).param == "top_logprobs"


def test_logit_bias_has_string_keys_and_is_clamped():
    assert completion(logit_bias={"5": 200, "6": -1e300, "7": 1}).logit_bias == {5: 100.0, 6: -100.0, 7: 1.0}
    for key in ("x", "-1", "1.0", "", "٣", "9" * 30):
        assert refusal(completion, logit_bias={key: 1}).param == "logit_bias"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("n", 0),
        ("min_tokens", -1),
        ("min_tokens", 60),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 5),
        ("stop_token_ids", [-1]),
        ("bad_words", [""]),
        ("allowed_token_ids", []),
        ("prompt_logprobs", -2),
    ],
)
@pytest.mark.parametrize("make", [completion, chat])
def test_a_value_out_of_range_is_refused_under_its_name(make, field, value):
    error = refusal(make, **{"max_tokens": 50, field: value})
    assert error.param == field and field in error.message


@pytest.mark.parametrize("make", [completion, chat])
def test_several_answers_need_chance(make):
    error = refusal(make, n=2, temperature=0)
    assert error.param == "n" and "greedy" in error.message


def test_stream_fields():
    def check(**fields):
        check_stream_fields(CompletionRequest.model_validate({"prompt": "Hi", **fields}))

    check(stream=True, stream_options={}, prompt_logprobs=0)
    check(stream_options=None, prompt_logprobs=3)
    assert refusal(check, stream_options={"include_usage": True}).param == "stream_options"
    assert refusal(check, stream_options={}, stream=False).param == "stream_options"
    assert refusal(check, stream=True, prompt_logprobs=1).param == "prompt_logprobs"
    assert refusal(check, stream=True, prompt_logprobs=-1).param == "prompt_logprobs"


@pytest.mark.parametrize(
    ("message", "of_completion", "of_chat"),
    [
        ("the prompt (length 9) is longer than", "prompt", "messages"),
        ("messages[2] needs a 'role'", None, "messages"),
        ("a key of logit_bias must be an integer", "logit_bias", "logit_bias"),
        ("continue_final_message=True continues the last message", None, "continue_final_message"),
        ("something else went wrong", None, None),
    ],
)
def test_the_engines_errors_are_matched_to_fields(message, of_completion, of_chat):
    body = CompletionRequest(prompt=["Hi"])
    assert as_bad_request(ValueError(message), body).param == of_completion
    assert as_bad_request(ValueError(message), ChatCompletionRequest(messages=[])).param == of_chat
