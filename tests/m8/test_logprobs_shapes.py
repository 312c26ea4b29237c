"""Logprobs in the shapes of OpenAI's two APIs, exactly."""

import math

import pytest

from folovllm.entrypoints.openai.logprobs import LOWEST, CompletionLogprobs, chat_logprobs, finite, prompt_logprobs
from folovllm.outputs import Logprob
from tests.m1.tiny_tokenizers import byte_level

pytestmark = pytest.mark.m8

# Two positions: token 7 was the likeliest; token 9 was sampled although it is not among the two likeliest.
FIRST = {7: Logprob(-0.25, 1, "Hi"), 8: Logprob(-1.5, 2, "Ho")}
SECOND = {9: Logprob(-3.0, 5, " 你"), 4: Logprob(-0.5, 1, "!"), 5: Logprob(-1.0, 2, "?")}


def test_completion():
    assert CompletionLogprobs(None).shape([7, 9], [FIRST, SECOND]) == {
        "text_offset": [0, 2],
        "token_logprobs": [-0.25, -3.0],
        "tokens": ["Hi", " 你"],
        "top_logprobs": [{"Hi": -0.25, "Ho": -1.5}, {" 你": -3.0, "!": -0.5, "?": -1.0}],  # k entries, then k + 1
    }


def test_the_offset_goes_on_from_chunk_to_chunk():
    logprobs = CompletionLogprobs(None)
    assert logprobs.shape([7], [FIRST])["text_offset"] == [0]
    assert logprobs.shape([], []) == {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    assert logprobs.shape([9, 7], [SECOND, FIRST])["text_offset"] == [2, 4]


def test_the_first_token_of_a_prompt_has_a_text_and_nulls():
    tokenizer = byte_level()
    first = tokenizer.encode(" the")[0]
    shape = CompletionLogprobs(tokenizer).shape([first, 7], [None, FIRST])
    assert shape["tokens"] == [tokenizer.token_text(first), "Hi"]
    assert shape["token_logprobs"] == [None, -0.25] and shape["top_logprobs"][0] is None
    assert shape["text_offset"] == [0, len(tokenizer.token_text(first))]


def test_tokens_as_ids():
    shape = CompletionLogprobs(None, as_token_ids=True).shape([3, 9], [None, SECOND])
    assert shape["tokens"] == ["token_id:3", "token_id:9"]
    assert list(shape["top_logprobs"][1]) == ["token_id:9", "token_id:4", "token_id:5"]
    assert CompletionLogprobs(None).shape([3], [{3: Logprob(-1.0, 1)}])["tokens"] == ["token_id:3"]  # no tokenizer


def test_of_two_tokens_with_one_text_the_sampled_one_counts():
    position = {1: Logprob(-2.0, 2, ""), 2: Logprob(-0.5, 1, "")}
    assert CompletionLogprobs(None).shape([1], [position])["top_logprobs"] == [{"": -2.0}]


def test_chat():
    assert chat_logprobs([7, 9], [FIRST, SECOND], 2) == {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.25,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Hi", "logprob": -0.25, "bytes": [72, 105]},
                    {"token": "Ho", "logprob": -1.5, "bytes": [72, 111]},
                ],
            },
            {
                "token": " 你",
                "logprob": -3.0,
                "bytes": [32, 228, 189, 160],
                "top_logprobs": [
                    {"token": "!", "logprob": -0.5, "bytes": [33]},
                    {"token": "?", "logprob": -1.0, "bytes": [63]},
                ],
            },
        ]
    }


def test_chat_without_top_logprobs_and_as_ids():
    (entry,) = chat_logprobs([7], [FIRST], 0)["content"]
    assert entry == {"token": "Hi", "logprob": -0.25, "bytes": [72, 105], "top_logprobs": []}
    (entry,) = chat_logprobs([9], [SECOND], -1, as_token_ids=True)["content"]
    assert entry["token"] == "token_id:9" and entry["bytes"] == [32, 228, 189, 160]
    assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:4", "token_id:5", "token_id:9"]


def test_prompt():
    assert prompt_logprobs(None) is None
    assert prompt_logprobs([None, FIRST]) == [
        None,
        {
            "7": {"logprob": -0.25, "rank": 1, "decoded_token": "Hi"},
            "8": {"logprob": -1.5, "rank": 2, "decoded_token": "Ho"},
        },
    ]


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e6])
def test_json_gets_finite_numbers(value):
    assert finite(value) == LOWEST
    position = {1: Logprob(value, 1, "x")}
    assert CompletionLogprobs(None).shape([1], [position])["token_logprobs"] == [LOWEST]
    assert chat_logprobs([1], [position], 1)["content"][0]["top_logprobs"][0]["logprob"] == LOWEST
    assert prompt_logprobs([position]) == [{"1": {"logprob": LOWEST, "rank": 1, "decoded_token": "x"}}]
