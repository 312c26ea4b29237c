# killed-by: a_row_is_the_same_in_every_batch | between two other rows
"""One generator for the whole batch, seeded by its first row: a row gets what the rows before it have left."""

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
        key = (seeds[0], output_indices[0])
        number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4])
        noise.exponential_(generator=torch.Generator().manual_seed(number))
        return noise.clamp(min=1e-30).to(device)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        noise = self.exponential_noise(seeds, output_indices, probs.shape[1], probs.device)  # [R, V]
        return (probs / noise).argmax(dim=-1)
