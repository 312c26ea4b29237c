"""Forbidding and favouring single tokens: allowed ids, bad words, min_tokens, logit_bias.

Milestone: M1. vLLM counterparts: vllm/v1/sample/ops/bad_words.py, vllm/v1/sample/logits_processor/builtin.py.
Left out: grammar bitmasks (they act on the logits before the sampler sees them).

Forbidding a token means setting its logit to -inf: its probability e^-inf is exactly 0, and no later step (adding,
multiplying by a positive number, dividing by a temperature) can bring it back. That is why the masks may be applied in
any order among themselves. All functions named `..._` change `logits` in place; the sampler gives them its own copy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from folovllm.transfers import to_device

NEG_INF = float("-inf")


@dataclass(frozen=True)
class TokenPairs:
    """A few (row, token id) cells of a logits matrix, and optionally a number for each.

    E.g. rows [0, 0, 3], token_ids [7, 9, 7]: tokens 7 and 9 of row 0, token 7 of row 3.
    """

    rows: torch.Tensor  # [N] int64
    token_ids: torch.Tensor  # [N] int64
    values: torch.Tensor | None = None  # [N] float32

    @classmethod
    def build(
        cls, cells: Sequence[tuple[int, int]], device: torch.device | str, values: Sequence[float] | None = None
    ) -> "TokenPairs | None":
        """Returns None if there is no cell, so that the sampler skips the step."""
        if not cells:
            return None
        index = to_device(cells, device, torch.int64)  # [N, 2]
        numbers = None if values is None else to_device(values, device, torch.float32)  # [N]
        return cls(index[:, 0], index[:, 1], numbers)


def apply_allowed_token_ids_(logits: torch.Tensor, forbidden: torch.Tensor) -> None:
    """Sets everything outside a row's `allowed_token_ids` to -inf. `logits` and `forbidden` (bool) are `[R, V]`."""
    logits.masked_fill_(forbidden, NEG_INF)


def mask_tokens_(logits: torch.Tensor, cells: TokenPairs) -> None:
    """Sets the given cells of `logits [R, V]` to -inf (bad words, and the stop ids below min_tokens)."""
    set_cells_(logits, cells, NEG_INF)


def set_cells_(matrix: torch.Tensor, cells: TokenPairs, value: float) -> None:
    """Sets the given cells of `matrix [R, V]` to one value.

    `matrix[rows, ids] = value` would do the same, but it makes a tensor on the host and copies that to a GPU.
    """
    matrix.index_put_((cells.rows, cells.token_ids), matrix.new_full((), value))


def apply_logit_bias_(logits: torch.Tensor, cells: TokenPairs) -> None:
    """Adds `cells.values` to the given cells of `logits [R, V]`."""
    assert cells.values is not None
    logits[cells.rows, cells.token_ids] += cells.values  # a row names a token once: its logit_bias is a dict


def banned_by_bad_words(bad_words: Iterable[Sequence[int]], output_token_ids: Sequence[int]) -> list[int]:
    """Returns the token ids that would complete a bad word now.

    A word of several tokens bans its last token only while the output ends with all the others. Each of its tokens
    alone stays allowed. Only generated tokens count: a word whose first half is in the prompt is not recognised.

    E.g. bad_words [[5], [1, 2, 3]]: output [9, 1, 2] -> [5, 3]; output [9, 1] -> [5].
    """
    banned = []
    for word in bad_words:
        if not word:
            continue
        prefix = list(word[:-1])
        # Counted from the front: a single-token word has an empty prefix, and output[-0:] would be the whole list.
        start = len(output_token_ids) - len(prefix)
        if list(output_token_ids[start:]) == prefix:  # an output shorter than the prefix is never equal to it
            banned.append(word[-1])
    return banned


def stop_ids_before_min_tokens(
    min_tokens: int, num_output_tokens: int, eos_token_id: int | None, stop_token_ids: Sequence[int] | None
) -> list[int]:
    """Returns the ids that may not be sampled yet: end-of-sequence and every stop id, while the output is too short.

    `ignore_eos` has no influence here: it means that EOS does not stop the request, min_tokens that EOS does not occur.
    """
    if num_output_tokens >= min_tokens:
        return []
    return ([] if eos_token_id is None else [eos_token_id]) + list(stop_token_ids or ())


def unmasked_choice(logits: torch.Tensor, fallback: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the best token per row, for rows that later masks leave without a token (see `revive_empty_rows_`).

    Args:
        logits: `[R, V]`.
        fallback: `[R]`, the answer for rows that are empty already.

    Returns: token ids `[R]`.
    """
    best, choice = logits.max(dim=-1)  # [R], [R]
    return choice if fallback is None else torch.where(best == NEG_INF, fallback, choice)


def revive_empty_rows_(logits: torch.Tensor, choice: torch.Tensor) -> None:
    """Gives rows of `logits [R, V]` that have only -inf left one token: `choice[r]` gets logit 0, so probability 1.

    Such a row has no distribution (softmax is 0/0 = NaN), and a NaN must not reach the draw. With exactly one finite
    entry every later step works and picks it, greedy or not; rows that are not empty keep their value.
    """
    empty = logits.amax(dim=-1, keepdim=True) == NEG_INF  # [R, 1]
    cell = choice.unsqueeze(-1)  # [R, 1]
    logits.scatter_(1, cell, logits.gather(1, cell).masked_fill_(empty, 0.0))
