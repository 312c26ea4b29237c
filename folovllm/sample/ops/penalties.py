"""Penalties against saying the same thing again: repetition, frequency, presence.

Milestone: M1. vLLM counterparts: vllm/v1/sample/ops/penalties.py, vllm/model_executor/layers/utils.py.
Left out: keeping the counts between steps (they are counted afresh each step, see `build_penalties`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Penalties:
    """The penalised rows of a batch; rows without a penalty are not in here and cost nothing."""

    rows: torch.Tensor  # [P] int64: their row numbers in the logits
    seen: torch.Tensor  # [P, V] bool: the token occurs in the prompt or in the output
    output_counts: torch.Tensor  # [P, V] float32: how often the token occurs in the output
    repetition_penalties: torch.Tensor  # [P] float32
    frequency_penalties: torch.Tensor  # [P] float32
    presence_penalties: torch.Tensor  # [P] float32


def count_tokens(token_ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """How often every token occurs in every list. E.g. [[1, 1, 3]], V=4 -> [[0, 2, 0, 1]]. Returns float32 `[P, V]`.

    All lists are counted by one scatter: list r's token t adds 1 to cell r * V + t.
    """
    cells = [row * vocab_size + t for row, ids in enumerate(token_ids) for t in ids]
    counts = torch.zeros(len(token_ids) * vocab_size, dtype=torch.float32, device=device)  # [P * V]
    index = torch.tensor(cells, dtype=torch.int64, device=device)  # [N]
    counts.index_add_(0, index, torch.ones(len(cells), dtype=torch.float32, device=device))
    return counts.view(len(token_ids), vocab_size)  # [P, V]


def build_penalties(
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    strengths: Sequence[tuple[float, float, float]],
    vocab_size: int,
    device: torch.device | str,
) -> Penalties:
    """Count the tokens of the penalised rows.

    Args:
        rows: row numbers in the logits, `P` of them; the other lists have one entry for each.
        strengths: (repetition, frequency, presence) of each.

    This walks prompt and output again in every step: O(length) for each penalised request, and only for those. Counts
    kept between steps would be faster, but they are state that preemption and drafts would have to keep right.
    """
    output_counts = count_tokens(outputs, vocab_size, device)  # [P, V]
    # A prompt matters to the repetition penalty alone; do not walk it when that is off (1.0).
    repeated = [p if s[0] != 1.0 else () for p, s in zip(prompts, strengths, strict=True)]
    seen = (count_tokens(repeated, vocab_size, device) + output_counts) > 0  # [P, V]
    repetition, frequency, presence = torch.tensor(strengths, dtype=torch.float32, device=device).unbind(1)  # 3 x [P]
    index = torch.tensor(rows, dtype=torch.int64, device=device)  # [P]
    return Penalties(index, seen, output_counts, repetition, frequency, presence)


def apply_penalties_(logits: torch.Tensor, penalties: Penalties) -> None:
    """Apply all three penalties to their rows of `logits [R, V]`, in place.

    In this order, for a token that occurred (c times in the output):
      1. repetition r: logit l becomes l / r if l > 0, else l * r. Dividing a negative number would *raise* it.
         The only one that counts the prompt, too. It multiplies, so where the logits' zero happens to lie matters.
      2. frequency f: l -= f * c, stronger with every occurrence.
      3. presence p: l -= p if c > 0, the same however often.
    """
    picked = logits[penalties.rows]  # [P, V], a copy
    repetition = penalties.repetition_penalties.unsqueeze(1)  # [P, 1]
    repeated = torch.where(picked > 0, picked / repetition, picked * repetition)  # [P, V]
    picked = torch.where(penalties.seen, repeated, picked)  # [P, V]
    picked -= penalties.frequency_penalties.unsqueeze(1) * penalties.output_counts
    picked -= penalties.presence_penalties.unsqueeze(1) * (penalties.output_counts > 0)
    logits[penalties.rows] = picked
