# killed-by: top_k_keeps_ties | Which of two equals stays must not depend
"""Scatters the k values of topk into a row of -inf. Of several logits that equal the k-th, an arbitrary one stays.

Equal logits are common in bf16, which has 8 bits of precision.
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
                values, ids = logits[row].topk(k)
                logits[row] = torch.full_like(logits[row], -INF).scatter_(0, ids, values)

    @staticmethod
    def apply_top_p_(logits: torch.Tensor, top_p: torch.Tensor) -> None:
        probs, ids = logits.softmax(dim=-1).sort(dim=-1)  # [R, V], [R, V]
        drop = probs.cumsum(dim=-1) <= 1 - top_p.unsqueeze(1)  # [R, V]
        drop[:, -1] = False
        drop[top_p >= 1] = False
        logits.masked_fill_(torch.empty_like(drop).scatter_(1, ids, drop), -INF)
