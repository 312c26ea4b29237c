# killed-by: the_same_key_gives_the_same_noise_again | a generator has kept its state
"""A generator per seed that lives on between the steps, as in vLLM (`generators` in its SamplingMetadata).

It is right only if every number that it gives is used. A draw that is thrown away has moved it, so vLLM moves it back
by hand (`set_offset` in gpu_model_runner.py) when it ignores the token of a prompt that is not complete.
"""

from collections.abc import Sequence

import torch

from folovllm.sample.sampler import Sampler as EngineSampler

GENERATORS: dict[int, torch.Generator] = {}


class Sampler(EngineSampler):
    @staticmethod
    def exponential_noise(
        seeds: Sequence[int], output_indices: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> torch.Tensor:
        noise = torch.empty(len(seeds), vocab_size)  # [R, V]
        for row, seed in enumerate(seeds):
            generator = GENERATORS.setdefault(seed, torch.Generator().manual_seed(seed % 2**63))
            noise[row].exponential_(generator=generator)
        return noise.clamp(min=1e-30).to(device)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        noise = self.exponential_noise(seeds, output_indices, probs.shape[1], probs.device)  # [R, V]
        return (probs / noise).argmax(dim=-1)
