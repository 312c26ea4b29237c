"""m1/seeded_noise: the noise of a draw as a function of (seed, output index), and the draw itself."""

from collections.abc import Sequence

import torch

from folovllm.sample.sampler import Sampler as EngineSampler


class Sampler(EngineSampler):
    @staticmethod
    def exponential_noise(
        seeds: Sequence[int], output_indices: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> torch.Tensor:
        """Returns exponentially distributed noise with mean 1, float32 [R, vocab_size], all of it finite and > 0.

        Row r is a function of (seeds[r], output_indices[r]) and of nothing else: not of other rows, of earlier calls,
        or of torch's global generator, which stays as it is. A seed is any integer; it may be negative or have 64 bits.
        """
        raise NotImplementedError("m1/seeded_noise: exponential_noise")

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        """Draws one token per row of `probs` [R, V] by the exponential race, with the noise of exponential_noise.

        Returns int64 [R]: the token where noise / probability is smallest. A token of probability 0 is never drawn.
        """
        raise NotImplementedError("m1/seeded_noise: random_sample")
