"""The checks of m1/detokenize, on a toy tokenizer whose tokens are pieces of bytes, as those of real ones are."""

import random
from typing import Any

from folovllm.engine.detokenizer import TextStream
from folovllm.learn.check import Mine, check

BAD = "\ufffd"  # what a decoder writes for bytes that are no character
# Tokens from 256 on. Some end inside a character: merges of bytes do not stop at its borders.
PIECES = [b" the", b" cat", b"hello", "你".encode(), "你".encode()[:2], "你".encode()[2:] + b"!", "😀".encode()[:3]]
END, USER = 300, 301
SPECIAL = {END: b"<|end|>", USER: b"<|user|>"}
TEXTS = ["a", "é", "hello the cat", "你好, 世界!", "😀 the 😀😀", "naïve café", "x你y😀z", "  two  spaces "]


class ToyTokenizer:
    """Ids 0 to 255 are bytes, then come PIECES, then two special tokens. Counts the ids that it has decoded.

    With `strips` it drops a space at the beginning of what it is given, as decoders of Llama-like vocabularies do.
    """

    all_special_ids = frozenset(SPECIAL)

    def __init__(self, strips: bool = False) -> None:
        self.strips, self.num_decoded = strips, 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        kept = [i for i in token_ids if not (skip_special_tokens and i in SPECIAL)]
        text = b"".join(map(self.bytes_of, kept)).decode(errors="replace")
        return text.removeprefix(" ") if self.strips else text

    def token_text(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    @staticmethod
    def bytes_of(token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return PIECES[token_id - 256] if token_id < 256 + len(PIECES) else SPECIAL.get(token_id, b"")

    @staticmethod
    def encode(text: str, rng: random.Random | None = None) -> list[int]:
        """The bytes of a text as tokens; with `rng`, some of them in pieces."""
        data, ids = text.encode(), []
        while data:
            fits = [256 + i for i, piece in enumerate(PIECES) if data.startswith(piece)]
            ids.append(rng.choice(fits) if fits and rng and rng.random() < 0.8 else data[0])
            data = data[len(ToyTokenizer.bytes_of(ids[-1])) :]
        return ids


def stream(
    cls: Any, ids: list[int], prompt: str | list[int] = "", skip: bool = True, strips: bool = False
) -> list[str]:
    """What each call of step returns, and then flush."""
    tokenizer = ToyTokenizer(strips)
    decoder = cls(tokenizer, tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, skip)
    return [*(decoder.step(token_id) for token_id in ids), decoder.flush()]


def prediction() -> str:
    ids = ToyTokenizer.encode("é你!")
    pieces, early = stream(TextStream, ids), stream(TextStream, ids[:4])
    calls = [str(pieces.index(character) + 1) for character in "é你!"]
    return f"calls {', '.join(calls)}; flush returns {len(early[-1])}\nstep returns {pieces[:-1]}; flush: {early[-1]!r}"


@check("unit", spec="R1.29", hint=1)
def a_character_comes_out_with_its_last_byte(mine: Mine) -> None:
    """An unfinished character is held back, and a finished one is shown at once."""
    got = stream(mine.cls, ToyTokenizer.encode("a😀你b"))
    expected = ["a", "", "", "", "😀", "", "", "你", "b", ""]
    assert not any(BAD in piece for piece in got), (
        f"the bytes of 'a😀你b', one token each, gave {got}: half a character was printed, and it cannot be taken back"
    )
    assert got == expected, f"the bytes of 'a😀你b', one token each, gave {got}, expected {expected}"


@check("unit", spec="R1.29", hint=2)
def a_token_may_end_inside_a_character(mine: Mine) -> None:
    """A token may finish one character and begin the next."""
    ids = [ord("x"), 260, 261, 262, 0x80]  # "x", two bytes of 你, its last byte and "!", three bytes of 😀, its last
    got, expected = stream(mine.cls, ids), ["x", "", "你!", "", "😀", ""]
    assert got == expected, (
        f"tokens {[ToyTokenizer.bytes_of(i) for i in ids]} gave {got}, expected {expected}: the pieces must add up, "
        "and none may hold half a character"
    )


@check("unit", spec="R1.28", hint=1)
def unfinished_bytes_come_out_at_the_end(mine: Mine) -> None:
    """If a request ends inside a character, flush returns what is left, so that no byte disappears."""
    got = stream(mine.cls, ToyTokenizer.encode("ok😀")[:-1])
    assert "".join(got) == f"ok{BAD}", (
        f"'ok' and three of the four bytes of 😀 gave {got}, expected 'o', 'k', and U+FFFD from flush"
    )


@check("unit", spec="R1.28", hint=3)
def a_space_after_the_prompt_is_kept(mine: Mine) -> None:
    """A decoder that strips the first space of what it is given must not strip the first space of the answer."""
    prompt, ids = "hello", [256, 257]  # " the", " cat"
    got = "".join(stream(mine.cls, ids, prompt, strips=True))
    assert got == " the cat", (
        f"after the prompt 'hello', the tokens ' the' and ' cat' gave {got!r}, expected ' the cat': without a left "
        "neighbour in the window a Llama-like decoder drops a space, and words run together"
    )


@check("unit", spec="R1.28", hint=3)
def special_tokens_are_skipped_or_written(mine: Mine) -> None:
    """Special tokens leave no text if they are to be skipped, and are written otherwise, also inside a character."""
    ids = [256, END, 257, 0xC3, USER, 0xA9]  # " the", end, " cat", first byte of é, user, second byte of é
    got = "".join(stream(mine.cls, ids))
    assert got == " the caté", f"with skip_special_tokens the text is {got!r}, expected ' the caté'"
    got = "".join(stream(mine.cls, [256, END, 257], skip=False))
    assert got == " the<|end|> cat", f"without skip_special_tokens it is {got!r}, expected ' the<|end|> cat'"
    for prompt, ids in (([258], [256, END, 257]), ([258, USER], [256, 257])):  # the prompt is "hello"
        got = "".join(stream(mine.cls, ids, prompt, strips=True))
        assert got == " the cat", (
            f"the prompt {prompt} and the tokens {ids} (258 is 'hello', 256 ' the', 257 ' cat', and {END} and {USER} "
            f"are skipped) gave {got!r}, expected ' the cat': a skipped token has no text to show or to lean on"
        )


@check("property", spec="R1.28", hint=2)
def pieces_add_up_to_the_text(mine: Mine) -> None:
    """For any text, cut into any tokens, after any prompt: the pieces add up, and none holds half a character."""
    rng = random.Random(0)
    for size in range(1, 60):
        text, prompt = ("".join(rng.choices(TEXTS, k=1 + size // 8)) for _ in range(2))
        ids, strips = ToyTokenizer.encode(text, rng), size % 2 == 0
        pieces = stream(mine.cls, ids, prompt, strips=strips)
        case = f"prompt {prompt!r}, tokens {[ToyTokenizer.bytes_of(i) for i in ids]}"
        assert "".join(pieces) == text, f"{case}: the pieces {pieces} add up to {''.join(pieces)!r}, expected {text!r}"
        assert not any(BAD in piece for piece in pieces), f"{case}: half a character was shown: {pieces}"


@check("property", spec="R1.28", hint=2)
def bytes_that_are_no_text_add_up_too(mine: Mine) -> None:
    """A model may write any bytes: the pieces add up to what decoding everything at once gives."""
    rng = random.Random(1)
    for size in range(1, 60):
        ids = [rng.choice((0xC3, 0xE4, 0xBD, 0xF0, 0x9F, 0xFF, 0x41, 0x20, 256, 260, 262)) for _ in range(size)]
        got, expected = "".join(stream(mine.cls, ids)), ToyTokenizer().decode(ids)
        assert got == expected, (
            f"tokens {[ToyTokenizer.bytes_of(i) for i in ids]} add up to {got!r}, expected {expected!r}"
        )


@check("engine", spec="R1.28", hint=3)
def a_real_engine_writes_the_text(mine: Mine) -> None:
    """In a real engine (a tiny model of random weights), the text of a request is that of its tokens."""
    from folovllm.entrypoints.llm import LLM
    from folovllm.learn.defaults import tiny_model
    from folovllm.sampling_params import SamplingParams

    llm = LLM(tiny_model(), preset="m1", dtype="float32", device="cpu", max_model_len=64, parts=mine.parts,
              skip_tokenizer_init=True)  # fmt: skip
    tokenizer: Any = ToyTokenizer()
    llm.llm_engine.output_processor.tokenizer = tokenizer
    params = [SamplingParams(seed=seed, temperature=1.0, max_tokens=24, ignore_eos=True) for seed in range(4)]
    prompts: list[Any] = [{"prompt_token_ids": ToyTokenizer.encode("hello")}] * len(params)
    for output in llm.generate(prompts, params, use_tqdm=False):
        ids, text = list(output.outputs[0].token_ids), output.outputs[0].text
        expected = tokenizer.decode(ids)
        assert text == expected, f"the tokens {ids} came out as {text!r}, expected {expected!r}"


@check("counters", spec="R1.31", hint=2)
def a_token_costs_the_same_late_in_the_text(mine: Mine) -> None:
    """The cost of a token does not grow with the text: only a short window is decoded."""
    cost = {length: ids_decoded(mine.cls, length) for length in (100, 800)}
    assert cost[800] <= 10 * cost[100], (
        f"100 tokens decode {cost[100]:,} ids and 800 tokens {cost[800]:,}, expected about 8 times as many: if the "
        "whole text is decoded at each token, the cost is quadratic"
    )


def ids_decoded(cls: Any, length: int) -> int:
    tokenizer = ToyTokenizer()
    decoder = cls(tokenizer, tokenizer.encode("hello"), True)
    for token_id in ToyTokenizer.encode("你好 the cat " * length)[:length]:
        decoder.step(token_id)
    return tokenizer.num_decoded
