"""Logprobs in the shapes of OpenAI's two APIs.

Milestone: M8. vLLM counterpart: `_create_completion_logprobs` (vllm/entrypoints/openai/serving_completion.py),
`_create_chat_logprobs` (serving_chat.py), `clamp_prompt_logprobs` (serving_engine.py).

    completion   {"tokens": ["Hello", "!"], "token_logprobs": [-0.1, -2.0], "top_logprobs": [{"Hello": -0.1}, ...],
                  "text_offset": [0, 5]}                                        lists in parallel, one entry per token
    chat         {"content": [{"token": "Hello", "logprob": -0.1, "bytes": [72, ...], "top_logprobs": [...]}, ...]}

One difference to vLLM: a chat's `top_logprobs` are the k likeliest tokens, best first, as OpenAI documents it. vLLM
puts the sampled token first and drops the last one instead.
"""

import math
from collections.abc import Sequence
from typing import Any

from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import Logprob, LogprobsOnePosition

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have

Positions = Sequence[LogprobsOnePosition | None]


class CompletionLogprobs:
    """Makes the logprobs of one choice of /v1/completions. `text_offset` continues from one chunk to the next."""

    def __init__(self, tokenizer: Tokenizer | None, as_token_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._offset = 0  # characters of the tokens so far

    def shape(self, token_ids: Sequence[int], positions: Positions) -> dict[str, Any]:
        """The object for these tokens. A position without logprobs, the first of a prompt, gives nulls."""
        tokens, offsets = [], []
        for token_id, position in zip(token_ids, positions, strict=True):
            entry = self._entry_without_logprob(token_id) if position is None else position[token_id]
            tokens.append(_token(token_id, entry, self._as_token_ids))
            offsets.append(self._offset)
            self._offset += len(tokens[-1])
        return {
            "text_offset": offsets,
            "token_logprobs": [
                None if position is None else finite(position[token_id].logprob)
                for token_id, position in zip(token_ids, positions, strict=True)
            ],
            "tokens": tokens,
            "top_logprobs": [None if position is None else self._top(position) for position in positions],
        }

    def _entry_without_logprob(self, token_id: int) -> Logprob:
        text = None if self._tokenizer is None else self._tokenizer.token_text(token_id)
        return Logprob(math.nan, decoded_token=text)

    def _top(self, position: LogprobsOnePosition) -> dict[str, float]:
        """The token itself and the k likeliest. If two tokens have the same text, the first one counts."""
        top: dict[str, float] = {}
        for token_id, entry in position.items():
            top.setdefault(_token(token_id, entry, self._as_token_ids), finite(entry.logprob))
        return top


def chat_logprobs(
    token_ids: Sequence[int], positions: Positions, num_top: int, as_token_ids: bool = False
) -> dict[str, Any]:
    """The logprobs of one choice of /v1/chat/completions. `num_top` -1 shows all that the engine gave."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        assert position is not None, "only the first token of a prompt has none"
        by_rank = sorted(position.items(), key=lambda item: item[1].rank or 0)
        top = [_chat_entry(i, entry, as_token_ids) for i, entry in by_rank[: None if num_top < 0 else num_top]]
        content.append({**_chat_entry(token_id, position[token_id], as_token_ids), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(positions: Positions | None) -> list[dict[str, Any] | None] | None:
    """vLLM's shape for a prompt: per position a dict of token id -> logprob, rank and text; null at the first."""
    if positions is None:
        return None
    return [None if position is None else {str(i): _plain(e) for i, e in position.items()} for position in positions]


def finite(logprob: float) -> float:
    return max(LOWEST, logprob)  # in this order NaN becomes LOWEST, too


def _plain(entry: Logprob) -> dict[str, Any]:
    return {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}


def _chat_entry(token_id: int, entry: Logprob, as_token_ids: bool) -> dict[str, Any]:
    text = entry.decoded_token
    return {
        "token": _token(token_id, entry, as_token_ids),
        "logprob": finite(entry.logprob),
        "bytes": None if text is None else list(text.encode("utf-8", errors="replace")),
    }


def _token(token_id: int, entry: Logprob, as_token_ids: bool) -> str:
    """The token's text; its id if that is asked for, or if there is no tokenizer."""
    if as_token_ids or entry.decoded_token is None:
        return f"token_id:{token_id}"
    return entry.decoded_token
