# killed-by: a_space_after_the_prompt_is_kept | words run together
"""The window starts empty after each piece, and without the prompt. A decoder that strips the first space strips all.

vLLM keeps the two offsets prefix_offset and read_offset in its slow detokenizer for this reason.
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
        if token_id in self.skipped:
            return ""
        self.window.append(token_id)
        text = self.decode(self.window[self.done :])
        if text.endswith("\ufffd"):
            return ""
        self.window, self.done = [], 0
        return text

    def flush(self) -> str:
        return self.decode(self.window[self.done :])

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)
