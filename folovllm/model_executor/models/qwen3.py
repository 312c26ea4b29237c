"""Qwen3: Llama with an RMSNorm on every query and key head, and a head size independent of the hidden size.

Milestone: M1. vLLM counterpart: vllm/model_executor/models/qwen3.py. Left out: the mixture-of-experts sizes.
"""

import torch

from folovllm.distributed.communicator import SINGLE_RANK, Communicator
from folovllm.hf_config import ModelArchitecture
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import QuantizationConfig
from folovllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


class Qwen3Attention(LlamaAttention):
    def __init__(
        self,
        arch: ModelArchitecture,
        quant_config: QuantizationConfig | None,
        prefix: str,
        tp: Communicator = SINGLE_RANK,
    ) -> None:
        super().__init__(arch, quant_config, prefix, tp)
        self.q_norm = RMSNorm(arch.head_dim, arch.rms_norm_eps)
        self.k_norm = RMSNorm(arch.head_dim, arch.rms_norm_eps)

    def normalize(self, qk: torch.Tensor) -> torch.Tensor:
        """Per head, before the rotation: it keeps the logits of long sequences bounded."""
        query, key = qk.split((self.num_heads, self.num_kv_heads), dim=1)
        return torch.cat((self.q_norm(query), self.k_norm(key)), dim=1)  # [num_tokens, q and k heads, head_size]


class Qwen3DecoderLayer(LlamaDecoderLayer):
    attention_class = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    decoder_layer_class = Qwen3DecoderLayer
