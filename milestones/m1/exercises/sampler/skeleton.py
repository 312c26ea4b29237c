"""m1/sampler: temperature, top-k and top-p, which shape the distribution before a token is drawn."""

import torch

from folovllm.sample.sampler import Sampler as EngineSampler


class Sampler(EngineSampler):
    @staticmethod
    def apply_temperature_(logits: torch.Tensor, temperature: torch.Tensor) -> None:
        """Divides row r of `logits` [R, V] by temperature[r], in place. `temperature` is float32 [R].

        A row of temperature 0 is greedy and stays as it is.
        """
        raise NotImplementedError("m1/sampler: apply_temperature_")

    @staticmethod
    def apply_top_k_(logits: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> None:
        """Sets to -inf every logit of row r of `logits` [R, V] that is below its top_k[r]-th largest, in place.

        `top_k` is int64 [R], each in 1..V; V turns the step off for the row. All logits that equal the k-th stay.
        `max_top_k` is the largest k of the rows where the step is on: enough for `topk`, without asking the device.
        """
        raise NotImplementedError("m1/sampler: apply_top_k_")

    @staticmethod
    def apply_top_p_(logits: torch.Tensor, top_p: torch.Tensor) -> None:
        """Keeps, in row r of `logits` [R, V], the fewest most likely tokens whose probabilities reach top_p[r].

        The others become -inf, in place. `top_p` is float32 [R], each in (0, 1]; 1 turns the step off for the row.
        The likeliest token always stays. Of tokens with equal probabilities, as many stay as are needed.
        """
        raise NotImplementedError("m1/sampler: apply_top_p_")
