"""`decoded_token`: a character whose bytes lie in several tokens belongs to the token that finishes it, as in vLLM."""

import pytest

from folovllm.engine.logprobs import LogprobsProcessor, decoded_token
from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import TokenLogprobs
from folovllm.sampling_params import SamplingParams
from tests.m1.tiny_tokenizers import byte_fallback, byte_ids, byte_level

pytestmark = pytest.mark.m1


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str | None]:
    """`decoded_token` of each token of a sample, as a user gets them."""
    processor = LogprobsProcessor(tokenizer, SamplingParams(logprobs=0))
    for token_id in ids:
        processor.add_sample([TokenLogprobs([token_id], [-1.0], 1)])
    assert processor.logprobs is not None
    return [position[token_id].decoded_token for position, token_id in zip(processor.logprobs, ids, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("中", ["", "", "中"]),
        ("😀", ["", "", "", "😀"]),
        ("é", ["", "é"]),
        ("aéb", ["a", "", "é", "b"]),
        ("é中", ["", "é", "", "", "中"]),
        ("😀😀", ["", "", "", "😀", "", "", "", "😀"]),
        ("a b", ["a", " ", "b"]),
    ],
)
def test_the_last_byte_of_a_character_brings_it(text: str, expected: list[str]) -> None:
    assert texts_of(byte_level(), byte_ids(text.encode())) == expected


def test_bytes_that_never_become_a_character_have_no_text() -> None:
    """More bytes than a character has: vLLM looks back at four tokens at most."""
    assert texts_of(byte_level(), byte_ids(b"\xf0\x9f\x98")) == ["", "", ""]
    assert texts_of(byte_level(), byte_ids(b"\x80" * 6)) == [""] * 6


def test_byte_fallback_tokenizers() -> None:
    """Llama 2's decoder strips the first space of what it decodes: nothing of the text before may leak in."""
    tokenizer = byte_fallback()
    ids = [
        tokenizer.backend.token_to_id(piece)
        for piece in ("▁the", "<0xC3>", "<0xA9>", "▁the", "<0xE4>", "<0xBD>", "<0xA0>")
    ]
    assert texts_of(tokenizer, ids) == [" the", "", "é", " the", "", "", "你"]


def test_other_candidates_are_read_after_the_same_context() -> None:
    """Each of the top k would follow the sampled tokens, not its neighbour in the list."""
    e4, bd, a0, a1 = byte_ids(b"\xe4\xbd\xa0\xa1")
    processor = LogprobsProcessor(byte_level(), SamplingParams(logprobs=2))
    for token_id in (e4, bd):
        processor.add_sample([TokenLogprobs([token_id], [-1.0], 1)])
    processor.add_sample([TokenLogprobs([a0, a0, a1], [-0.5, -0.5, -1.0], 1)])
    assert processor.logprobs is not None
    assert [entry.decoded_token for entry in processor.logprobs[-1].values()] == ["你", "佡"]


def test_prompt_logprobs_join_characters_too() -> None:
    ids = byte_ids("x中y".encode())
    processor = LogprobsProcessor(byte_level(), SamplingParams(prompt_logprobs=0))
    processor.set_prompt([TokenLogprobs([token_id], [-1.0], 1) for token_id in ids[1:]])
    assert processor.prompt_logprobs is not None and processor.prompt_logprobs[0] is None
    texts = [next(iter(p.values())).decoded_token for p in processor.prompt_logprobs if p is not None]
    assert texts == ["", "", "中", "y"]


def test_the_pieces_add_up_to_the_text() -> None:
    text = "naïve café 你好 😀! ελληνικά"
    tokenizer = byte_level()
    for ids in (byte_ids(text.encode()), tokenizer.encode(text)):
        assert (
            "".join(decoded_token(tokenizer, token_id, ids[max(0, i - 4) : i]) for i, token_id in enumerate(ids))
            == text
        )


@pytest.mark.parametrize("text", ["ไทย", "the 好世界 dog", "👩‍👩‍👧 ü", "ééééé", "🇩🇪🇫🇷"])
def test_a_run_of_byte_tokens_adds_up_to_the_text(text: str) -> None:
    """vllm issue 27300 reports empty decoded tokens: a byte-fallback decoder spoils all of a run of byte
    tokens that begins inside a character, so the context has to begin where a character does.
    """
    tokenizer = byte_fallback()
    ids = tokenizer.encode(text, add_special_tokens=False)
    processor = LogprobsProcessor(tokenizer, SamplingParams(logprobs=0, max_tokens=99))
    processor.add_sample([TokenLogprobs([token_id], [-1.0], 1) for token_id in ids])
    assert processor.logprobs is not None
    pieces = [str(position[token_id].decoded_token) for token_id, position in zip(ids, processor.logprobs, strict=True)]
    assert "".join(pieces).removeprefix(" ") == text
