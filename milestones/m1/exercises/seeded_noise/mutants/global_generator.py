# killed-by: a_row_is_the_same_in_every_batch | whenever the server is busy
"""Draws from torch's global generator, so a seed does nothing.

mini-sglang drew from it without having seeded it:
https://github.com/sgl-project/mini-sglang/pull/88 (commit 690f55a).
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
        noise.exponential_()
        return noise.clamp(min=1e-30).to(device)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        noise = self.exponential_noise(seeds, output_indices, probs.shape[1], probs.device)  # [R, V]
        return (probs / noise).argmax(dim=-1)
