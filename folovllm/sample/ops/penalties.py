"""Penalties against repetition: repetition, frequency and presence penalty.

Milestone: M1. vLLM counterparts: vllm/v1/sample/ops/penalties.py, vllm/model_executor/layers/utils.py. Left out:
keeping the counts between steps (they are counted anew in each step, see `build_penalties`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Penalties:
    """The N (row, token) cells of the logits that a penalty changes. Every other cell costs nothing."""

    rows: torch.Tensor  # [N] int64
    token_ids: torch.Tensor  # [N] int64: tokens that occur in the prompt or in the output of their row, each once
    output_counts: torch.Tensor  # [N] float32: how often the token occurs in the output
    repetition_penalties: torch.Tensor  # [N] float32, those of the row
    frequency_penalties: torch.Tensor  # [N] float32
    presence_penalties: torch.Tensor  # [N] float32


def count_tokens(token_ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """Counts how often every token occurs in every list. Returns float32 `[P, V]`.

    All lists are counted by one scatter: token t of list r adds 1 to cell r * V + t. E.g. [[1, 1, 3]], V=4 -> [[0, 2,
    0, 1]].
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
    """Counts the tokens of the penalised rows.

    Args:
        rows: row numbers in the logits, `P` of them; the other lists have one entry for each.
        strengths: (repetition, frequency, presence) of each.

    This reads prompt and output again in every step: O(length) for each penalised request, and only for those. Counts
    that are kept between steps would be faster, but preemption would have to keep them right.
    """
    # A prompt matters to the repetition penalty alone; do not walk it when that is off (1.0).
    repeated = [p if s[0] != 1.0 else () for p, s in zip(prompts, strengths, strict=True)]
    seen = [{*p, *o} for p, o in zip(repeated, outputs, strict=True)]
    which = torch.tensor([i for i, ids in enumerate(seen) for _ in ids], dtype=torch.int64, device=device)  # [N]
    token_ids = torch.tensor([t for ids in seen for t in ids], dtype=torch.int64, device=device)  # [N]
    output_counts = count_tokens(outputs, vocab_size, device)[which, token_ids]  # [N]
    per_cell = torch.tensor(strengths, dtype=torch.float32, device=device)[which]  # [N, 3]
    index = torch.tensor(rows, dtype=torch.int64, device=device)  # [P]
    return Penalties(index[which], token_ids, output_counts, *per_cell.unbind(1))


def apply_penalties_(logits: torch.Tensor, penalties: Penalties) -> None:
    """Applies all three penalties to their rows of `logits [R, V]`, in place.

    In this order, for a token that occurred (c times in the output):
        1. repetition r: logit l becomes l / r if l > 0, else l * r. Dividing a negative number would *raise* it.
           Only this penalty counts the prompt, too. It multiplies, so the place of the logits' zero matters.
        2. frequency f: l -= f * c, which grows with every occurrence.
        3. presence p: l -= p if c > 0, however often the token occurred.
    """
    cells = penalties.rows, penalties.token_ids
    picked = logits[cells]  # [N], a copy
    repetition = penalties.repetition_penalties  # [N]
    picked = torch.where(picked > 0, picked / repetition, picked * repetition)  # [N]
    picked -= penalties.frequency_penalties * penalties.output_counts
    picked -= penalties.presence_penalties * (penalties.output_counts > 0)
    logits[cells] = picked
