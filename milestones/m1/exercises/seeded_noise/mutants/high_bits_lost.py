# killed-by: every_integer_is_a_seed | 3 and 4294967299 have the same noise
"""Multiplies and adds. Neighbours are far apart, but bit 32 of a seed has no influence on the bits 0 to 31.

torch's CPU generator is a Mersenne Twister that is seeded with 32 bits, and manual_seed drops the others silently.
"""

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
            number = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63
            noise[row].exponential_(generator=torch.Generator().manual_seed(number))
        return noise.clamp(min=1e-30).to(device)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        noise = self.exponential_noise(seeds, output_indices, probs.shape[1], probs.device)  # [R, V]
        return (probs / noise).argmax(dim=-1)
