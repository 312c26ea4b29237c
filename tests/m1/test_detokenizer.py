"""The incremental detokeniser: pieces add up to the text, no broken characters, stop strings (R1.28 to R1.31)."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.engine.detokenizer import IncrementalDetokenizer, TextStream, find_stop_string
from folovllm.engine.tokenizer import Tokenizer
from folovllm.sampling_params import SamplingParams
from tests.m1.tiny_tokenizers import byte_fallback, byte_ids, byte_level

pytestmark = pytest.mark.m1

RELAXED = settings(deadline=None)  # the machine may be busy
NO_PROMPT: list[int] = []
# Leads of 2, 3 and 4 bytes, continuations, bytes that are never UTF-8, U+FFFD's own bytes, ASCII.
TRICKY_BYTES = st.sampled_from(bytes([0xC3, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xEF, 0xBF, 0x41, 0x20]))


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] = NO_PROMPT, skip: bool = True) -> list[str]:
    decoder = TextStream(tokenizer, prompt, skip)
    return [*(decoder.step(token_id) for token_id in ids), decoder.flush()]


# --- pieces add up -----------------------------------------------------------------------------------------------


@RELAXED
@given(ids=st.lists(st.integers(0, 430), max_size=60), prompt=st.text(max_size=12), skip=st.booleans())
def test_random_ids_add_up_to_the_whole_decode(ids: list[int], prompt: str, skip: bool) -> None:
    tokenizer = byte_level()  # 420 ids: some of these are beyond the vocabulary
    prompt_ids = tokenizer.encode(prompt)
    assert "".join(stream(tokenizer, ids, prompt_ids, skip)) == tokenizer.decode(ids, skip)


@RELAXED
@given(data=st.lists(TRICKY_BYTES, max_size=150).map(bytes))
def test_any_bytes_add_up_to_the_whole_decode(data: bytes) -> None:
    ids = byte_ids(data)
    assert "".join(stream(byte_level(), ids)) == data.decode(errors="replace") == byte_level().decode(ids)


@RELAXED
@given(unit=st.lists(TRICKY_BYTES, min_size=1, max_size=4).map(bytes), cut=st.integers(1, 4))
def test_long_runs_of_one_pattern_add_up(unit: bytes, cut: int) -> None:
    ids = byte_ids(unit * 60)[: -cut or None]
    assert "".join(stream(byte_level(), ids)) == byte_level().decode(ids)


@RELAXED
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_no_broken_character_is_ever_shown(text: str) -> None:
    data, seen = text.encode(), b""
    pieces = stream(byte_level(), byte_ids(data))
    for piece in pieces:
        assert "\ufffd" not in piece
        seen += piece.encode()
        assert data.startswith(seen)
    assert seen == data


def test_a_character_over_several_tokens_comes_out_with_its_last_byte() -> None:
    assert stream(byte_level(), byte_ids("a😀你b".encode())) == ["a", "", "", "", "😀", "", "", "你", "b", ""]


def test_unfinished_bytes_at_the_end_come_out_at_the_end() -> None:
    ids = byte_ids(b"ok\xf0\x9f\x98")
    assert stream(byte_level(), ids) == ["o", "k", "", "", "", "\ufffd"]


def test_a_genuine_replacement_character_is_kept() -> None:
    assert "".join(stream(byte_level(), byte_ids("a\ufffdb\ufffd".encode()))) == "a\ufffdb\ufffd"


def test_a_prompt_that_ends_inside_a_character_spoils_nothing() -> None:
    prompt = byte_ids("hello 😀".encode()[:-2])
    assert "".join(stream(byte_level(), byte_ids(b" world"), prompt)) == " world"
    rest = byte_ids("😀".encode()[-2:] + b"!")  # by themselves no character: the text is what decoding the output gives
    assert "".join(stream(byte_level(), rest, prompt)) == "\ufffd\ufffd!"
    assert "".join(stream(byte_level(), rest[::2], prompt)) == "\ufffd!"


def test_ids_beyond_the_vocabulary_leave_no_text_and_push_out_no_context() -> None:
    """Models pad their vocabulary: such ids can be sampled."""
    first, *rest = byte_ids("😀".encode())
    assert "".join(stream(byte_level(), [first, *[430] * 200, *rest])) == "😀"


def test_special_tokens_are_skipped_or_written() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode("the "), 1, *tokenizer.encode("dog"), 0]
    assert "".join(stream(tokenizer, ids)) == "the dog"
    assert "".join(stream(tokenizer, ids, skip=False)) == "the <|user|>dog<|end|>"


# --- byte fallback ---------------------------------------------------------------------------------------------


@RELAXED
@given(prompt=st.text("the ab你😀", min_size=1, max_size=20), text=st.text("the ab你é😀€", max_size=30))
def test_byte_fallback_keeps_spaces_and_characters(prompt: str, text: str) -> None:
    tokenizer = byte_fallback()
    prompt_ids = [1, *tokenizer.encode(prompt)]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids, prompt_ids)
    whole, head = tokenizer.decode(prompt_ids + ids), tokenizer.decode(prompt_ids)
    assert head + "".join(pieces) == whole  # so the first piece keeps its space
    assert not any("\ufffd" in piece for piece in pieces)


@RELAXED
@given(ids=st.lists(st.integers(0, 294), max_size=60))
def test_byte_fallback_random_ids(ids: list[int]) -> None:
    """Decoding all at once spoils a whole byte run for one bad byte; a stream cannot take back what it showed."""
    tokenizer = byte_fallback()
    text, whole = "".join(stream(tokenizer, ids)), tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert text == whole
    tokens = [i for i in ids if i >= 259]  # ordinary pieces, in whatever garbage they stand, come out in order
    rest = iter(text.replace(" ", ""))
    assert all(letter in rest for letter in tokenizer.decode(tokens).replace(" ", ""))


@pytest.mark.parametrize("ends_badly", [False, True])
def test_byte_fallback_shows_good_characters_of_a_run_at_once(ends_badly: bool) -> None:
    ids = [3 + byte for byte in "é😀".encode() + (b"\xff" if ends_badly else b"")]
    assert stream(byte_fallback(), ids)[:6] == ["", "é", "", "", "", "😀"]
    assert "".join(stream(byte_fallback(), ids)) == "é😀" + ("\ufffd" if ends_badly else "")


# --- cost ------------------------------------------------------------------------------------------------------


class CountingTokenizer(Tokenizer):
    """Counts how many token ids were decoded in all."""

    def __init__(self, inner: Tokenizer) -> None:
        super().__init__(inner.backend)
        self.num_decoded = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("unit", [b"word ", "你".encode(), b"\xff", b"\x9f\xf0", b"\xe4", "\ufffd".encode(), None])
def test_cost_per_token_does_not_grow(unit: bytes | None) -> None:
    """Text, characters, four kinds of garbage, and a model that emits EOS for ever (ignore_eos)."""
    cost = []
    for count in (1000, 4000):
        tokenizer = CountingTokenizer(byte_level())
        ids = ([0] * count) if unit is None else byte_ids(unit * count)[:count]
        stream(tokenizer, ids)
        cost.append(tokenizer.num_decoded / count)
    assert cost[1] <= max(cost[0] * 1.1, 1) and cost[1] < 70


# --- stop strings ----------------------------------------------------------------------------------------------


def run(
    text: str, finish: str | None = "length", step: int = 1, **params: object
) -> tuple[IncrementalDetokenizer, str | None, list[str]]:
    """Feed one token per character, `step` tokens per update, until a stop string matches. Also returns the deltas."""
    detokenizer = IncrementalDetokenizer(byte_level(), SamplingParams(**params), NO_PROMPT)  # type: ignore[arg-type]
    ids, deltas = byte_ids(text.encode()), []
    for start in range(0, len(ids), step):
        last = start + step >= len(ids)
        match = detokenizer.update(ids[start : start + step], finish if last else None)
        deltas.append(detokenizer.next_delta(finished=match is not None or last))
        if match is not None:
            return detokenizer, match, deltas
    return detokenizer, None, deltas


@pytest.mark.parametrize(
    ("text", "params", "expected_stop", "expected_text"),
    [
        ("one two", {"stop": "tw"}, "tw", "one "),
        ("one two", {"stop": "tw", "include_stop_str_in_output": True}, "tw", "one tw"),
        ("one two", {"stop": ["zzz"]}, None, "one two"),
        ("one two", {"stop": ["two", "tw", "t"]}, "t", "one "),  # completes first
        ("one two", {"stop": ["ne", "one"]}, "ne", "o"),  # both complete with the same character: list order
        ("one two", {"stop": ["one", "ne"]}, "one", ""),
        ("abcabc", {"stop": "c", "min_tokens": 3}, "c", "abcab"),  # the first c is shielded
        ("abcabc", {"stop": "c", "min_tokens": 2}, "c", "ab"),
        ("abcd", {"stop": "bcd", "min_tokens": 3}, "bcd", "a"),  # begins under the shield, ends after it
        ("你好世界", {"stop": "世"}, "世", "你好"),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 100])
def test_stop_strings(text: str, params: dict, expected_stop: str | None, expected_text: str, step: int) -> None:
    detokenizer, match, deltas = run(text, step=step, **params)
    assert (match, detokenizer.text) == (expected_stop, expected_text)
    assert "".join(deltas) == expected_text


def test_the_earliest_completion_wins_within_one_update() -> None:
    assert find_stop_string("a stop now", ["now", "stop"], 2) == ("stop", 2)
    assert find_stop_string("aaa", ["aa"], 2) == ("aa", 1)  # ends in the new character
    assert find_stop_string("stop", ["stop"], 4) is None  # searched before


def test_token_ids_are_not_truncated() -> None:
    detokenizer, _, _ = run("one two three", step=100, stop=["tw"])
    assert len(detokenizer.token_ids) == len("one two three")


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    _, _, deltas = run("abcdefg", stop=["xyz", "x"])
    assert deltas == ["", "", "a", "b", "c", "d", "efg"]
    _, _, deltas = run("abc", stop=["xyz"], include_stop_str_in_output=True)
    assert deltas == ["a", "b", "c"]


@RELAXED
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 8),
    step=st.integers(1, 5),
    include=st.booleans(),
)
def test_stop_strings_against_brute_force(
    text: str, stop: list[str], min_tokens: int, step: int, include: bool
) -> None:
    expected: tuple[str | None, str] = (None, text)
    for end in range(min_tokens + 1, len(text) + 1):  # character `end` is the first after which a stop string stands
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            expected = (found[0], text[:end] if include else text[: end - len(found[0])])
            break
    params = {"stop": stop, "min_tokens": min_tokens, "include_stop_str_in_output": include, "max_tokens": 100}
    detokenizer, match, deltas = run(text, step=step, **params)
    assert (match, detokenizer.text) == expected
    assert "".join(deltas) == expected[1]  # what was shown was never taken back


# --- the engine's own stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, "hi"),
        ({"skip_special_tokens": False}, "hi"),  # EOS is not text even then
        ({"include_stop_str_in_output": True}, "hi"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "hi<|end|>"),
    ],
)
def test_eos_is_in_the_ids_but_not_in_the_text(params: dict, expected: str) -> None:
    detokenizer = IncrementalDetokenizer(byte_level(), SamplingParams(**params), NO_PROMPT)
    detokenizer.update(byte_ids(b"hi"))
    assert detokenizer.update([0], "stop") is None
    assert detokenizer.text == expected
    assert detokenizer.token_ids == [*byte_ids(b"hi"), 0]


def test_a_stop_token_flushes_what_was_held() -> None:
    detokenizer = IncrementalDetokenizer(byte_level(), SamplingParams(), NO_PROMPT)
    detokenizer.update(byte_ids(b"a\xe4"))
    detokenizer.update(byte_ids(b"b"), "stop")
    assert detokenizer.text == "a\ufffd"


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_without_detokenising_there_is_no_text(has_tokenizer: bool) -> None:
    params = SamplingParams(detokenize=not has_tokenizer)
    detokenizer = IncrementalDetokenizer(byte_level() if has_tokenizer else None, params, [5])
    assert detokenizer.update([7, 8], "length") is None
    assert (detokenizer.text, detokenizer.token_ids) == ("", [7, 8])


# --- the default model's tokenizer ----------------------------------------------------------------------------


@pytest.mark.weights
@RELAXED
@given(data=st.data())
def test_real_tokenizer_adds_up(model_dir: Path, data: st.DataObject) -> None:
    tokenizer = _real(model_dir)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=80))
    text = data.draw(st.text(max_size=30))
    for sample in (ids, tokenizer.encode(text)):
        assert "".join(stream(tokenizer, sample, tokenizer.encode("Question:"))) == tokenizer.decode(sample)


_REAL: dict[Path, Tokenizer] = {}


def _real(folder: Path) -> Tokenizer:
    if folder not in _REAL:
        _REAL[folder] = Tokenizer.from_folder(folder)
    return _REAL[folder]
