"""m1/detokenize: the text of a request, piece by piece, while its token ids come in."""

from folovllm.engine.detokenizer import TextStream as EngineTextStream
from folovllm.engine.tokenizer import Tokenizer


class TextStream(EngineTextStream):
    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], skip_special_tokens: bool) -> None:
        """Starts the stream of one request. The text of the prompt is context, and is never returned.

        You need tokenizer.decode(token_ids, skip_special_tokens=...) and tokenizer.all_special_ids (a set).
        """
        raise NotImplementedError("m1/detokenize: __init__")

    def step(self, token_id: int) -> str:
        """Returns the text that `token_id` completes, or "" while a character is unfinished.

        All pieces and the rest from `flush` add up to the text of all tokens.
        """
        raise NotImplementedError("m1/detokenize: step")

    def flush(self) -> str:
        """Returns what is still held back, when the request ends: unfinished bytes come out as U+FFFD."""
        raise NotImplementedError("m1/detokenize: flush")
