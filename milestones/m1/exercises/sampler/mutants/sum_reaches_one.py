# killed-by: a_step_that_is_off_changes_no_bit | top_p=1 (off) changed the row [0.0, -200.0, 0.0, 0.0]
"""Sorts from the largest down and removes what stands behind a sum of p. With p = 1 the sum gets there too early.

A learner of this exercise passed all checks with it; in float32, 145 of 200 random rows of 300 tokens lost some.
"""

import torch

from folovllm.sample.sampler import Sampler as EngineSampler

INF = float("inf")


class Sampler(EngineSampler):
    @staticmethod
    def apply_temperature_(logits: torch.Tensor, temperature: torch.Tensor) -> None:
        logits /= torch.where(temperature < 1e-5, 1.0, temperature).unsqueeze(1)

    @staticmethod
    def apply_top_k_(logits: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> None:
        for row, k in enumerate(top_k.tolist()):
            if k < logits.shape[1]:
                kth = logits[row].topk(k).values[-1]
                logits[row].masked_fill_(logits[row] < kth, -INF)

    @staticmethod
    def apply_top_p_(logits: torch.Tensor, top_p: torch.Tensor) -> None:
        probs, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True)  # [R, V], [R, V]
        drop = probs.cumsum(dim=-1) - probs >= top_p.unsqueeze(1)  # [R, V]
        logits.masked_fill_(torch.empty_like(drop).scatter_(1, ids, drop), -INF)
