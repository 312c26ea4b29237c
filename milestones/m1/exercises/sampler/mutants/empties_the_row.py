# killed-by: top_p_always_keeps_the_likeliest | an empty row becomes NaN
"""Nothing protects the likeliest token: for a tiny p, 1 - p rounds to 1 and the whole row goes.

vLLM's apply_top_k_top_p sets `top_p_mask[:, -1] = False` for this.
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
        probs, ids = logits.softmax(dim=-1).sort(dim=-1)  # [R, V], [R, V]
        drop = probs.cumsum(dim=-1) <= 1 - top_p.unsqueeze(1)  # [R, V]
        drop[top_p >= 1] = False
        logits.masked_fill_(torch.empty_like(drop).scatter_(1, ids, drop), -INF)
