"""generate_naive: no cache, no batch, no scheduler. It recomputes everything for each token: the oracle of the rest.

Milestone: M1, kept for good. vLLM counterpart: none (nanochat keeps such a path for the same reason).
"""

from pathlib import Path

import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.no_cache import NoCacheBackend
from folovllm.forward_context import set_forward_context
from folovllm.hf_config import load_hf_config
from folovllm.model_executor.model_loader import load_model
from folovllm.model_executor.models.interface import CausalLM
from folovllm.request import Request, check_stop
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.sampler import Sampler


class NaiveModel:
    """A model with the no-cache backend bound to it."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_model_len: int | None = None,
    ) -> None:
        self.arch = load_hf_config(folder)
        self.device = torch.device(device)
        self.model: CausalLM = load_model(folder, self.arch, dtype, self.device, max_model_len=max_model_len)
        spec = AttentionSpec.from_arch(self.arch, dtype, self.device, block_size=1)
        for layer in self.model.attention_layers():
            layer.bind(NoCacheBackend(spec), torch.empty(0))

    @torch.inference_mode()
    def logits(self, token_ids: list[int], position_offset: int = 0) -> torch.Tensor:
        """Logits after the last of `token_ids`: [1, vocab_size]."""
        positions = torch.arange(len(token_ids), device=self.device) + position_offset  # [num_tokens]
        with set_forward_context(AttentionMetadata.single_sequence(len(token_ids))):
            hidden = self.model(torch.tensor(token_ids, device=self.device), positions)  # [num_tokens, hidden_size]
        return self.model.compute_logits(hidden[-1:])


def generate_naive(model: NaiveModel, request: Request, max_model_len: int | None = None) -> list[int]:
    """Output token ids of `request` (which it advances to its end), each from a forward pass over all tokens so far."""
    sampler = Sampler()
    limit = max_model_len or model.arch.max_context_len
    while not request.is_finished:
        logits = model.logits(request.all_token_ids, request.position_offset)
        row = SamplingRow(
            request.sampling_params,
            request.prompt_token_ids,
            request.output_token_ids,
            request.eos_token_id,
            request.seed,
            request.bad_words_token_ids,
            request.extra_eos_token_ids,
        )
        metadata = SamplingMetadata.build([row], logits.shape[-1], logits.device)
        request.append_output_token_id(sampler(logits, metadata).sampled_token_ids[0])
        check_stop(request, limit)
    return request.output_token_ids
