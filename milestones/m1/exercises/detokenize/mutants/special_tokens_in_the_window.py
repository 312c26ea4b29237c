# killed-by: special_tokens_are_skipped_or_written | expected ' the caté'
"""Skipped tokens enter the window, and the decoder is told to skip them. They push the context out of it.

Here one stands between the two bytes of a character, which then count as two pieces.
"""

from folovllm.engine.detokenizer import TextStream as EngineTextStream
from folovllm.engine.tokenizer import Tokenizer


class TextStream(EngineTextStream):
    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self.skipped = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self.window = [i for i in prompt_token_ids[-12:] if i not in self.skipped]
        self.done = len(self.window)  # the text of window[:done] was shown

    def step(self, token_id: int) -> str:
        self.window.append(token_id)
        text = self.decode(self.window)
        if token_id in self.skipped:
            self.window, self.done = [], 0
            return ""
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self.decode(self.window[: self.done])) :]
        self.window = self.window[self.done :]
        self.done = len(self.window)
        return piece

    def flush(self) -> str:
        return self.decode(self.window)[len(self.decode(self.window[: self.done])) :]

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)
