"""Log-probabilities of one request, from the sampler's lists to the dicts that users get.

Milestone: M1. vLLM counterpart: vllm/v1/engine/logprobs.py (`LogprobsProcessor`).
"""

import itertools
from typing import Any

from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import Logprob, LogprobsOnePosition, TokenLogprobs
from folovllm.sampling_params import SamplingParams

BROKEN = "\ufffd"  # what bytes decode to that are no whole character
MAX_CONTEXT = 4  # a UTF-8 character has at most four bytes


class LogprobsProcessor:
    """Collects sample and prompt logprobs. `tokenizer` None leaves `decoded_token` None."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer if params.detokenize else None
        self.logprobs: list[LogprobsOnePosition] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.prompt_logprobs: list[LogprobsOnePosition | None] | None = None
        self._context: list[int] = []  # the last MAX_CONTEXT sampled tokens

    def mark(self) -> tuple[dict[str, Any], int]:
        """What `rewind` needs to come back to this moment."""
        return vars(self).copy(), len(self.logprobs or ())

    def rewind(self, mark: tuple[dict[str, Any], int]) -> None:
        vars(self).update(mark[0])
        if self.logprobs is not None:
            del self.logprobs[mark[1] :]

    def add_sample(self, positions: list[TokenLogprobs] | None) -> None:
        if self.logprobs is None or self.cumulative_logprob is None:
            return
        for position in positions or ():
            self.logprobs.append(to_dict(position, self._tokenizer, self._context))
            self._context = [*self._context, position.token_ids[0]][-MAX_CONTEXT:]
            self.cumulative_logprob += position.logprobs[0]

    def set_prompt(self, positions: list[TokenLogprobs] | None) -> None:
        """`positions[i]` belongs to prompt token i + 1: nothing precedes the first token, so its entry is None."""
        if positions is None:
            return
        ids = [position.token_ids[0] for position in positions]
        contexts = (ids[max(0, i - MAX_CONTEXT) : i] for i in range(len(ids)))
        pairs = zip(positions, contexts, strict=True)
        self.prompt_logprobs = [None, *(to_dict(position, self._tokenizer, context) for position, context in pairs)]


def to_dict(position: TokenLogprobs, tokenizer: Tokenizer | None, context: list[int]) -> LogprobsOnePosition:
    """The token itself first, then the top k in order; k entries if the token is among them, else k + 1. `context`
    holds the last few tokens before this position.

    E.g. ids [9, 4, 9], rank 2 -> {9: rank 2, 4: rank 1}.
    """
    entries = zip(position.token_ids, position.logprobs, range(len(position.token_ids)), strict=True)
    result: LogprobsOnePosition = {}
    for token_id, logprob, order in entries:
        # A top-k entry's rank is its place, which overwrites the token's own rank (that counts ties); a dict keeps the
        # token's place at the front.
        text = None if tokenizer is None else decoded_token(tokenizer, token_id, context)
        result[token_id] = Logprob(logprob, order or position.rank, text)
    return result


def decoded_token(tokenizer: Tokenizer, token_id: int, context: list[int]) -> str:
    """The text that the token adds after `context`: the bytes of one character may lie in several tokens.

    A token that leaves a character unfinished adds nothing; the one that finishes it adds all that was held back.
    E.g. 中 in three byte tokens: "", "", "中". vLLM corrects a token only if its text ends inside a character; here a
    token that begins inside one and ends after it is corrected too, or its beginning would be lost.
    """
    text = tokenizer.token_text(token_id)
    if BROKEN not in text:
        return text
    context = _shortest_whole(tokenizer, token_id, context)
    joined = tokenizer.decode([*context, token_id], skip_special_tokens=False)
    if joined.endswith(BROKEN):
        return ""
    finished = _finished_text(tokenizer, context)
    if not finished:
        return joined.lstrip(BROKEN)  # the context begins inside a character that an earlier token has brought
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(finished, joined, strict=False))
    return joined[len(list(same)) :]


def _shortest_whole(tokenizer: Tokenizer, token_id: int, context: list[int]) -> list[int]:
    """The shortest end of `context` with which the token decodes to whole characters; `context` if there is none.

    A byte-fallback decoder (Llama 2, Mistral) spoils all of a run of byte tokens if the run begins inside a character.
    """
    tails = (context[len(context) - count :] for count in range(1, len(context) + 1))
    texts = ((tail, tokenizer.decode([*tail, token_id], skip_special_tokens=False)) for tail in tails)
    return next((tail for tail, text in texts if BROKEN not in text), context)


def _finished_text(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """The text of the tokens before an unfinished character at the end; "" if they all belong to one."""
    prefixes = (token_ids[:count] for count in range(len(token_ids), 0, -1))
    texts = (tokenizer.decode(prefix, skip_special_tokens=False) for prefix in prefixes)
    return next((text for text in texts if not text.endswith(BROKEN)), "")
