# killed-by: top_p_keeps_the_token_that_crosses_p | kept the tokens [1] (together 0.50), expected [1, 3]
"""Keeps tokens while the cumulative sum is at most p, so the token that crosses p goes.

It is the most common mistake in top-p code: many gists compare the inclusive sum of the descending order with p.
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
        drop = probs.cumsum(dim=-1) > top_p.unsqueeze(1)  # [R, V]
        drop[:, 0] = False
        drop[top_p >= 1] = False
        logits.masked_fill_(torch.empty_like(drop).scatter_(1, ids, drop), -INF)
