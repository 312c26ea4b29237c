# killed-by: unfinished_bytes_come_out_at_the_end | from flush
"""flush returns nothing, so bytes that are held back disappear when max_tokens ends a request inside a character."""

from folovllm.engine.detokenizer import TextStream as EngineTextStream
from folovllm.engine.tokenizer import Tokenizer


class TextStream(EngineTextStream):
    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self.skipped = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self.window = [i for i in prompt_token_ids[-12:] if i not in self.skipped]
        self.done = len(self.window)  # the text of window[:done] was shown

    def step(self, token_id: int) -> str:
        if token_id in self.skipped:
            return ""
        self.window.append(token_id)
        text = self.decode(self.window)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self.decode(self.window[: self.done])) :]
        self.window = self.window[self.done :]
        self.done = len(self.window)
        return piece

    def flush(self) -> str:
        return ""

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)
