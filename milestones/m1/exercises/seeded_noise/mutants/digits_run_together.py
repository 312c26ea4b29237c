# killed-by: neighbours_are_not_related | (1, 23) and (12, 3) have the same noise
"""Hashes the digits of both numbers without anything between them: 1 and 23 read like 12 and 3.

A learner of this exercise passed all checks with it.
"""

import hashlib
from collections.abc import Sequence

import torch

from folovllm.sample.sampler import Sampler as EngineSampler


class Sampler(EngineSampler):
    @staticmethod
    def exponential_noise(
        seeds: Sequence[int], output_indices: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> torch.Tensor:
        noise = torch.empty(len(seeds), vocab_size)  # [R, V]
        for row, (seed, index) in enumerate(zip(seeds, output_indices, strict=True)):
            number = int.from_bytes(hashlib.sha256(f"{seed}{index}".encode()).digest()[:4], "big")
            noise[row].exponential_(generator=torch.Generator().manual_seed(number))
        return noise.clamp(min=1e-30).to(device)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        noise = self.exponential_noise(seeds, output_indices, probs.shape[1], probs.device)  # [R, V]
        return (probs / noise).argmax(dim=-1)
