"""IncrementalDetokenizer: token ids of one request, as they arrive, into text; and the search for stop strings.

Milestone: M1. vLLM counterpart: vllm/v1/engine/detokenizer.py.
Left out: slow tokenizers, and with them the effect of `spaces_between_special_tokens`.

    tokens    ... "Hi" | " " E4 | BD | A0 | "!"          a token may end inside a character
    window         [...............]                     decoded anew at each token; a few tokens long
    shown     ... Hi                                     text already given out
    held               �    �                            may still become a character: wait
"""

from folovllm.engine.tokenizer import Tokenizer
from folovllm.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not UTF-8
MAX_HELD = 3  # an unfinished character is at most 3 bytes, and decoders write at most one U+FFFD per byte
PROMPT_WINDOWS = (6, 24)  # how many prompt tokens prime the decoder; the second if the first ends inside a character
WINDOW = 8  # tokens kept before old ones are dropped
GARBAGE_WINDOW, GARBAGE_KEPT = 64, 16  # the same where the model writes no UTF-8 at all


class TextStream:
    """Decodes one token at a time; the pieces add up to what decoding all tokens at once would give.

    Why not decode each token alone: characters span tokens, and Llama-like decoders strip the first space of whatever
    they are given, so a token needs its left context. Why not decode everything each time: quadratic. So a short window
    is decoded. Its cost does not grow with the text, also when the output is not UTF-8 (a test counts).

    Exact for byte-level vocabularies (SmolLM2, Llama 3, Qwen), whatever the ids. A byte-fallback decoder (Mistral)
    spoils a whole run of byte tokens when one of them is invalid; what was already shown of such a run stays.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self._window, self._shown = self._prime(prompt_token_ids)
        self._clean = len(self._window)  # window[:clean] ends at a character's end

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is unfinished."""
        if self._is_invisible(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode()
        if not text.startswith(self._shown):  # a byte-fallback run became invalid for now: look at its new part alone
            self._drop(self._clean, shown="")
            text = self._decode()
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD)
        piece = text[len(self._shown) : len(text) - held]
        self._shown += piece
        self._shorten(held)
        return piece

    def flush(self) -> str:
        """What is still held back, at the end: unfinished bytes come out as U+FFFD."""
        piece = self._decode()[len(self._shown) :]
        self._shown += piece
        return piece

    def _shorten(self, held: int) -> None:
        """Drop old tokens. The rest is decoded once more, to know how much of *its* text is shown."""
        if held == 0:
            if len(self._window) > WINDOW:
                self._drop(self._clean)  # leaves the last piece's tokens: enough context for the next
            self._clean = len(self._window)
        elif len(self._window) > GARBAGE_WINDOW:
            # No character has ended for long. 16 tokens decide how the last 3 U+FFFD read, wherever the cut falls.
            self._drop(len(self._window) - GARBAGE_KEPT)
            self._shown = self._shown[: len(self._shown) - held]
            self._clean = len(self._window)

    def _drop(self, count: int, shown: str | None = None) -> None:
        del self._window[:count]
        self._clean = 0
        self._shown = self._decode() if shown is None else shown

    def _prime(self, prompt_token_ids: list[int]) -> tuple[list[int], str]:
        for size in PROMPT_WINDOWS:
            tail = prompt_token_ids[-4 * size :]  # special tokens may be among them, e.g. a chat's role markers
            window = [i for i in tail if not self._is_invisible(i)][-size:]
            text = self._tokenizer.decode(window, skip_special_tokens=False)
            if not text.endswith(REPLACEMENT):
                return window, text
        return [], ""  # the prompt ends inside a character: start afresh

    def _is_invisible(self, token_id: int) -> bool:
        """Skipped, or beyond the vocabulary: such tokens leave no text and would only crowd the context out."""
        return token_id in self._skipped or not self._tokenizer.token_text(token_id)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)  # already filtered


class IncrementalDetokenizer:
    """Text and token ids of one request so far; stops it at its stop strings.

    With no tokenizer, or with `detokenize=False`, it only collects token ids. `text_stream` is the part
    engine.text_stream.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: list[int],
        text_stream: type[TextStream] = TextStream,
    ) -> None:
        self._stream: TextStream | None = None
        if tokenizer is not None and params.detokenize:
            self._stream = text_stream(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stop = params.stop_strings
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        # A stop string may be half written: its beginning must not be shown before we know.
        self._num_held_chars = 0 if self._include_stop else max(map(len, self._stop), default=1) - 1
        self.num_sent_chars = 0  # that `next_delta` has returned
        self.token_ids: list[int] = []
        self.text = ""

    def update(self, new_token_ids: list[int], finish_reason: str | None = None) -> str | None:
        """Take the tokens of one step; return the stop string that was found, if any, after truncating the text.

        `finish_reason` is the engine's verdict on this step. "stop" means that the last token ended the request (EOS
        or a stop token): it stays in `token_ids` but is not written, unless stop strings are to be included.
        """
        last_is_stop = finish_reason == "stop" and not self._include_stop
        num_written = len(new_token_ids) - 1 if last_is_stop and new_token_ids else len(new_token_ids)
        check_from = len(self.text)
        for index, token_id in enumerate(new_token_ids):
            self.token_ids.append(token_id)
            if self._stream is not None and index < num_written:
                self.text += self._stream.step(token_id)
            if len(self.token_ids) <= self._min_tokens:
                check_from = len(self.text)  # min_tokens shields the text up to here
        if self._stream is not None and finish_reason is not None:
            self.text += self._stream.flush()
        return self._check_stop_strings(check_from)

    def visible_text(self, finished: bool) -> str:
        """Everything that may be shown now."""
        return self.text if finished or not self._num_held_chars else self.text[: -self._num_held_chars]

    def next_delta(self, finished: bool) -> str:
        """What may be shown now and was not returned before."""
        text = self.visible_text(finished)
        start, self.num_sent_chars = self.num_sent_chars, max(self.num_sent_chars, len(text))
        return text[start:]

    def _check_stop_strings(self, check_from: int) -> str | None:
        if not self._stop or len(self.token_ids) <= self._min_tokens:
            return None
        match = find_stop_string(self.text, self._stop, check_from)
        if match is None:
            return None
        stop, start = match
        self.text = self.text[: start + len(stop) if self._include_stop else start]
        return stop


def find_stop_string(text: str, stop: list[str], check_from: int) -> tuple[str, int] | None:
    """The stop string that completes first at or after character `check_from`, and where it starts.

    Ties go to the earlier entry of `stop`. E.g. ("a stop now", ["now", "stop"], 2) -> ("stop", 2).
    """
    best: tuple[str, int] | None = None
    for candidate in stop:
        # It may begin in text that was searched before, but must end in new text.
        start = text.find(candidate, max(0, check_from - len(candidate) + 1))
        if start >= 0 and (best is None or start + len(candidate) < best[1] + len(best[0])):
            best = (candidate, start)
    return best
