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
    cells: list[tuple[int, int]] = []
    numbers: list[tuple[float, ...]] = []  # (count, repetition, frequency, presence) of each cell
    for row, prompt, output, strength in zip(rows, prompts, outputs, strengths, strict=True):
        counts = Counter(output)
        # A prompt matters to the repetition penalty alone, so it is not read if that is off (1.0).
        seen = counts.keys() | prompt if strength[0] != 1.0 else counts.keys()
        inside = [t for t in seen if 0 <= t < vocab_size]
        cells += [(row, t) for t in inside]
        numbers += [(counts[t], *strength) for t in inside]
    index = to_device(np.array(cells, dtype=np.int64).reshape(-1, 2), device)  # [N, 2]
    values = to_device(np.array(numbers, dtype=np.float32).reshape(-1, 4), device)  # [N, 4]
    return Penalties(*index.unbind(1), *values.unbind(1))


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
