# killed-by: a_character_comes_out_with_its_last_byte | half a character was printed
"""Decodes each token alone: Chinese text and emoji come out as U+FFFD.

It is the first thing that one writes, and the tests in English pass.
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
        return "" if token_id in self.skipped else self.decode([token_id])

    def flush(self) -> str:
        return ""

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)
