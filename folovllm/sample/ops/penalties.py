"""Penalties against repetition: repetition, frequency and presence penalty.

Milestone: M1. vLLM counterparts: vllm/v1/sample/ops/penalties.py, vllm/model_executor/layers/utils.py. Left out:
keeping the counts between steps (they are counted anew in each step, see `build_penalties`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from folovllm.transfers import to_device


@dataclass(frozen=True)
class Penalties:
    """The N (row, token) cells of the logits that a penalty changes. Every other cell costs nothing."""

    rows: torch.Tensor  # [N] int64
    token_ids: torch.Tensor  # [N] int64: tokens that occur in the prompt or in the output of their row, each once
    output_counts: torch.Tensor  # [N] float32: how often the token occurs in the output
    repetition_penalties: torch.Tensor  # [N] float32, those of the row
    frequency_penalties: torch.Tensor  # [N] float32
    presence_penalties: torch.Tensor  # [N] float32


def build_penalties(
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    strengths: Sequence[tuple[float, float, float]],
    vocab_size: int,
    device: torch.device | str,
) -> Penalties:
    """Counts the tokens of the penalised rows, on the host.

    E.g. rows [4], outputs [[1, 1, 3]]: cells (4, 1) and (4, 3) with output_counts 2 and 1.

    Args:
        rows: row numbers in the logits, `P` of them; the other lists have one entry for each.
        strengths: (repetition, frequency, presence) of each.

    This reads prompt and output again in every step: O(length) for each penalised request, and only for those. Counts
    that are kept between steps would be faster, but preemption would have to keep them right.
    """
    counts = [_occurrences(p if s[0] != 1.0 else (), o) for p, o, s in zip(prompts, outputs, strengths, strict=True)]
    token_ids = np.array([t for row in counts for t in row], dtype=np.int64)  # [N]
    output_counts = np.array([n for row in counts for n in row.values()], dtype=np.float32)  # [N]
    place = np.repeat(np.arange(len(rows)), [len(row) for row in counts])  # [N]
    inside = (token_ids >= 0) & (token_ids < vocab_size)  # [N]; an id beyond would be a cell of another row, or none
    index = np.stack([np.array(rows, dtype=np.int64)[place], token_ids])[:, inside]  # [2, N]
    numbers = np.vstack([output_counts, np.array(strengths, dtype=np.float32)[place].T])[:, inside]  # [4, N]
    return Penalties(*to_device(index, device), *to_device(numbers, device))


def _occurrences(prompt: Sequence[int], output: Sequence[int]) -> dict[int, int]:
    """Returns how often each token of a request occurs in its output. The prompt's own tokens have 0.

    A prompt matters to the repetition penalty alone, so the caller passes none if that is off (1.0).
    """
    counts = Counter(dict.fromkeys(prompt, 0))
    counts.update(output)
    return counts


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
