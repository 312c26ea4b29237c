"""The input processor: what reaches the engine is valid and complete; what is refused names the fix (R1.33)."""

from typing import Any

import numpy as np
import pytest

from folovllm.engine.input_processor import InputProcessor
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from tests.m1.tiny_tokenizers import byte_level

pytestmark = pytest.mark.m1

VOCAB, LIMIT, EOS = 420, 32, 0


def make(tokenizer: bool = True, **changes: Any) -> InputProcessor:
    values = {"vocab_size": VOCAB, "max_model_len": LIMIT, "max_logprobs": 5, "eos_token_id": EOS, "seed": 0, **changes}
    return InputProcessor(byte_level() if tokenizer else None, **values)


def process(prompt: Any = "the dog", processor: InputProcessor | None = None, **params: Any) -> Request:
    return (processor or make()).process("r", prompt, SamplingParams(**params))


# --- prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 4, 5],
        (3, 4, 5),
        list(np.array([3, 4, 5])),
        {"prompt_token_ids": [3, 4, 5]},
        {"prompt": "x", "prompt_token_ids": [3, 4, 5]},
    ],
)
def test_token_ids_come_through_as_plain_ints(prompt: Any) -> None:
    request = process(prompt)
    assert request.prompt_token_ids == [3, 4, 5]
    assert all(type(i) is int for i in request.prompt_token_ids)


@pytest.mark.parametrize("prompt", ["the dog", {"prompt": "the dog"}])
def test_text_is_encoded(prompt: Any) -> None:
    assert process(prompt).prompt_token_ids == byte_level().encode("the dog")
    assert InputProcessor.prompt_text(prompt) == "the dog"


def test_prompt_text_of_token_ids() -> None:
    assert InputProcessor.prompt_text([3]) is None
    assert InputProcessor.prompt_text({"prompt_token_ids": [3]}) is None
    assert InputProcessor.prompt_text({"prompt_token_ids": [3], "prompt": "x"}) == "x"


def test_the_callers_list_is_not_kept() -> None:
    ids = [3, 4]
    request = process(ids)
    ids.append(5)
    assert request.prompt_token_ids == [3, 4]


def test_the_rest_of_the_request() -> None:
    request = make().process("r", {"prompt": "a", "cache_salt": "s"}, SamplingParams(), arrival_time=1.5, priority=-2)
    assert (request.request_id, request.arrival_time, request.priority, request.cache_salt) == ("r", 1.5, -2, "s")
    assert request.eos_token_id == EOS


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "cannot be empty"),
    ([], "cannot be empty"),
    ({"prompt_token_ids": []}, "cannot be empty"),
    ([5] * 33, r"length 33\) is longer than the maximum model length of 32"),
    ([5] * 32, r"length 32\) plus the number of requested output tokens \(at least 1\)"),
    ([5, -1], "token id -1 is out of vocabulary .*0 to 419"),
    ([5, 420], "token id 420 is out of vocabulary"),
    ([500] * 9, "500, 500, 500, 500, 500, ... is out of vocabulary"),
    ([5, "6"], r"must be integers, got '6' \(str\)"),
    (["one", "two"], "got 'one'.*one call takes one prompt"),
    ([5, 6.0], "must be integers, got 6.0"),
    ([5, True], "must be integers, got True"),
    ([[5, 6]], "must be integers"),
    (None, "must be a string, a list of token ids, or a dict.*got NoneType"),
    (7, "got int: 7"),
    (b"bytes", "got bytes"),
    ({}, "needs 'prompt'"),
    ({"prompt": 7}, "needs 'prompt' .a string."),
    ({"promt": "x"}, "unknown prompt key 'promt'; did you mean 'prompt'"),
    ({"prompt_token_id": [1]}, "did you mean 'prompt_token_ids'"),
    ({"prompt": "x", "cache_salt": ""}, "cache_salt must be a non-empty string"),
    ({"prompt": "x", "cache_salt": 3}, "cache_salt must be a non-empty string, got 3"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process(prompt)


def test_text_without_a_tokenizer() -> None:
    processor = make(tokenizer=False)
    assert process([5], processor).prompt_token_ids == [5]
    with pytest.raises(ValueError, match=r"no tokenizer: pass \{'prompt_token_ids'"):
        process("text", processor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_id": ""}, "request_id must be a non-empty string"),
        ({"request_id": 5}, "request_id must be a non-empty string, got 5"),
        ({"params": {"n": 1}}, "must be a SamplingParams, got dict"),
        ({"priority": 1.5}, "priority must be an integer"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().process(**{"request_id": "r", "prompt": "x", "params": SamplingParams(), **changes})


# --- parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logprobs": 6}, "logprobs: 6 is greater than the maximum allowed, 5"),
        ({"prompt_logprobs": 6}, "prompt_logprobs: 6 is greater"),
        ({"logprobs": -1}, r"logprobs: -1 \(the whole vocabulary, 420\) is greater"),
        ({"stop_token_ids": [420]}, "stop_token_ids: token id 420 is out of vocabulary"),
        ({"allowed_token_ids": [3, 999]}, "allowed_token_ids: token id 999"),
        ({"logit_bias": {500: 1.0}}, "logit_bias: token id 500"),
        ({"max_tokens": None, "min_tokens": 31}, r"min_tokens \(31\) exceeds the 30 tokens that fit"),
    ],
)
def test_parameters_that_this_model_cannot_serve(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process([5, 6], **params)


def test_bad_words_outside_the_models_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"bad_words: 'dog': token id .* is out of vocabulary"):
        process([0], make(vocab_size=1), bad_words=["dog"])


@pytest.mark.parametrize(("params", "message"), [({"stop": "x"}, "stop strings"), ({"bad_words": ["x"]}, "bad_words")])
def test_what_needs_a_tokenizer(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} need a tokenizer"):
        process([5], make(tokenizer=False), **params)


def test_max_tokens() -> None:
    assert process([5] * 10, max_tokens=None).max_tokens == LIMIT - 10
    assert process([5] * 31, max_tokens=None).max_tokens == 1
    assert process([5] * 10, max_tokens=1000).max_tokens == 1000  # more than fit: ends by length


def test_logprobs() -> None:
    params = process(logprobs=5, prompt_logprobs=0).sampling_params
    assert (params.logprobs, params.prompt_logprobs) == (5, 0)
    params = process(processor=make(max_logprobs=-1), logprobs=-1, prompt_logprobs=-1).sampling_params
    assert (params.logprobs, params.prompt_logprobs) == (VOCAB, VOCAB)
    with pytest.raises(ValueError, match="421 is greater than the maximum allowed, 420"):
        process(processor=make(max_logprobs=-1), logprobs=421)


def test_extra_eos_ids_become_stop_token_ids() -> None:
    processor = make(extra_eos_token_ids=(EOS, 2, 7))
    assert process(processor=processor).sampling_params.stop_token_ids == [2, 7]  # EOS itself gives no stop_reason
    assert process(processor=processor, stop_token_ids=[9, 7]).sampling_params.stop_token_ids == [2, 7, 9]
    assert process(processor=processor, ignore_eos=True).sampling_params.stop_token_ids is None
    assert process(processor=processor, ignore_eos=True, stop_token_ids=[9]).sampling_params.stop_token_ids == [9]


def test_the_callers_params_are_not_changed() -> None:
    params = SamplingParams(max_tokens=None, logprobs=2, stop_token_ids=[9])
    before = params.replace()
    make(extra_eos_token_ids=(2,)).process("r", "x", params)
    assert params == before


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    encode = byte_level().encode
    banned = process(bad_words=["dog", " the"]).bad_words_token_ids
    assert banned == [encode("dog"), encode(" dog"), encode("the"), encode(" the")]
    assert process(bad_words=["dog", "dog"]).bad_words_token_ids == banned[:2]
    assert process(bad_words=["  "]).bad_words_token_ids == [encode("  ")]
    assert process().bad_words_token_ids == []


# --- seeds -----------------------------------------------------------------------------------------------------


def test_every_request_has_a_seed() -> None:
    first, second = make(seed=3), make(seed=3)
    drawn = [process(processor=first).seed for _ in range(4)]
    assert drawn == [process(processor=second).seed for _ in range(4)]
    assert len(set(drawn)) == 4 and all(0 <= seed < 2**63 for seed in drawn)
    assert process(processor=make(seed=4)).seed != drawn[0]
    assert process(seed=11).seed == 11


def test_a_refused_or_seeded_request_does_not_shift_the_seeds_of_others() -> None:
    plain, disturbed = make(), make()
    for wrong in ({"logprobs": 99}, {"stop_token_ids": [999]}):
        with pytest.raises(ValueError, match=r"logprobs|stop_token_ids"):
            process(processor=disturbed, **wrong)
    with pytest.raises(ValueError, match="bad_words"):
        process([0], InputProcessor(byte_level(), 1, 9), bad_words=["dog"])
    process(processor=disturbed, seed=5)
    assert process(processor=plain).seed == process(processor=disturbed).seed


def test_a_text_with_too_many_characters_is_refused_before_it_is_encoded() -> None:
    """A text of 20 MB would take seconds, and no token is longer than the vocabulary's longest."""
    limit = LIMIT * byte_level().max_chars_per_token
    with pytest.raises(ValueError, match=rf"\(length \d+\) is longer than the maximum model length of {LIMIT}"):
        process("a" * limit)
    message = f"of {limit + 1} characters is longer than .* {LIMIT} tokens, which are at most {limit} characters"
    with pytest.raises(ValueError, match=message):
        process("a" * (limit + 1))
    assert len(process({"prompt": "a" * (limit + 1), "prompt_token_ids": [3, 4]}).prompt_token_ids) == 2
