"""Step 9 of the sampler, from temperature to draw, as one C++ operator (csrc/sampling.cpp).

Milestone: M4. vLLM counterpart: the FlashInfer branch of vllm/v1/sample/ops/topk_topp_sampler.py. Left out: everything
but float32 on a CPU. The torch path (topk_topp.py, shortlist.py) covers the rest.
"""

from typing import Any

import torch

from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops.noise import random_key
from folovllm.sampling_params import GREEDY_EPSILON


def sample_(logits: torch.Tensor, metadata: SamplingMetadata, ops: Any) -> torch.Tensor | None:
    """Draws a token for every row of `logits [R, V]`, which are edited in place as in the torch path.

    `ops` are our C++ operators. Returns token ids `[R]`. They are meaningless for greedy rows, and -1 for rows where
    rounding might have decided; the torch path must draw for those. Returns None, with nothing done, if the operator
    cannot take these logits.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or not logits.is_contiguous():
        return None
    assert metadata.temperature is not None
    temperature = metadata.temperature.masked_fill(metadata.temperature < GREEDY_EPSILON, 0.0)  # [R], exactly 0: skip
    keys = [random_key(s, i) for s, i in zip(metadata.seeds, metadata.output_indices, strict=True)]
    key_bits = torch.tensor(keys, dtype=torch.uint64).view(torch.int64)  # [R]
    drawn: torch.Tensor = ops.sample_(logits, temperature, metadata.min_p, metadata.top_k, metadata.top_p, key_bits)
    return drawn
