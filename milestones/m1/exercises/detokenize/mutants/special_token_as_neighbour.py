# killed-by: special_tokens_are_skipped_or_written | a skipped token has no text to show or to lean on
"""Keeps the last token as left neighbour, whatever it is. A skipped one has no text, so the next space is lost.

And if the prompt ends with one, its text counts as shown although it is not in the window's. A learner of this exercise
passed all checks with it.
"""

from folovllm.engine.detokenizer import TextStream as EngineTextStream
from folovllm.engine.tokenizer import Tokenizer


class TextStream(EngineTextStream):
    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self.skip = skip_special_tokens
        self.window = list(prompt_token_ids[-1:])
        self.shown = tokenizer.decode(self.window, skip_special_tokens=False)

    def step(self, token_id: int) -> str:
        self.window.append(token_id)
        text = self.tokenizer.decode(self.window, skip_special_tokens=self.skip)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self.shown) :]
        self.window = [token_id]
        self.shown = self.tokenizer.decode(self.window, skip_special_tokens=self.skip)
        return piece

    def flush(self) -> str:
        return self.tokenizer.decode(self.window, skip_special_tokens=self.skip)[len(self.shown) :]
