# killed-by: neighbours_are_not_related | have the same noise
"""Ignores the index, so every token of a request is drawn with the same noise, and texts run in circles."""

from collections.abc import Sequence

import torch

from folovllm.sample.sampler import Sampler as EngineSampler


class Sampler(EngineSampler):
    @staticmethod
    def exponential_noise(
        seeds: Sequence[int], output_indices: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> torch.Tensor:
        noise = torch.empty(len(seeds), vocab_size)  # [R, V]
        for row, seed in enumerate(seeds):
            noise[row].exponential_(generator=torch.Generator().manual_seed(seed % 2**63))
        return noise.clamp(min=1e-30).to(device)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        noise = self.exponential_noise(seeds, output_indices, probs.shape[1], probs.device)  # [R, V]
        return (probs / noise).argmax(dim=-1)
