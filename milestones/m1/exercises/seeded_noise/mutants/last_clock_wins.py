# killed-by: the_first_clock_wins | expected [1, 2, 2]
"""argmax(probs * noise): the noise belongs under the probability, or the token with the latest clock wins."""

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
        for row, key in enumerate(zip(seeds, output_indices, strict=True)):
            number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4])
            noise[row].exponential_(generator=torch.Generator().manual_seed(number))
        return noise.clamp(min=1e-30).to(device)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        noise = self.exponential_noise(seeds, output_indices, probs.shape[1], probs.device)  # [R, V]
        return (probs * noise).argmax(dim=-1)
