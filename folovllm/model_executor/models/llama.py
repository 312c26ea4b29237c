"""Llama, the architecture that the others vary: SmolLM2, Llama 2 and 3.x, and Mistral without a sliding window.

Milestone: M1, M9 (`groups`: the ranks that share the model). vLLM counterpart: vllm/model_executor/models/llama.py.
Left out: LoRA.

Tokens arrive flat: those of all requests in one row, without padding. Only `self.attn` knows which belong together.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from folovllm.attention.layer import Attention
from folovllm.distributed.communicator import ONE_RANK, SINGLE_RANK, Communicator, ParallelGroups
from folovllm.forward_context import get_attn_metadata
from folovllm.hf_config import ModelArchitecture
from folovllm.model_executor.layers.activation import SiluAndMul
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    QuantizationConfig,
    RowParallelLinear,
)
from folovllm.model_executor.layers.rotary_embedding import ApplyRotary, RotaryEmbedding
from folovllm.model_executor.layers.vocab_embedding import ParallelLMHead, VocabParallelEmbedding
from folovllm.model_executor.models.interface import IntermediateTensors
from folovllm.model_executor.weight_utils import load_weights

CosSin = tuple[torch.Tensor, torch.Tensor]  # cos and sin of the step's positions, each [num_tokens, 1, head_size]
# What LlamaModel.run_layers does: hidden, residual and cos_sin -> hidden and residual of the selected rows.
RunLayers = Callable[[torch.Tensor, torch.Tensor, CosSin], tuple[torch.Tensor, torch.Tensor]]


class LlamaAttention(nn.Module):
    def __init__(
        self,
        arch: ModelArchitecture,
        quant_config: QuantizationConfig | None,
        prefix: str,
        tp: Communicator = SINGLE_RANK,
    ) -> None:
        super().__init__()
        self.head_size = arch.head_dim
        self.qkv_proj = QKVParallelLinear(
            arch.hidden_size,
            self.head_size,
            arch.num_attention_heads,
            arch.num_key_value_heads,
            bias=arch.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            tp=tp,
        )
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads  # of this rank
        self.o_proj = RowParallelLinear(
            arch.q_size, arch.hidden_size, bias=arch.o_bias, quant_config=quant_config, prefix=f"{prefix}.o_proj", tp=tp
        )
        self.rotary = ApplyRotary()
        self.attn = Attention(self.num_heads, self.head_size, self.num_kv_heads)

    def forward(self, hidden: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        qkv = self.qkv_proj(hidden).view(hidden.shape[0], -1, self.head_size)  # [num_tokens, all heads, head_size]
        num_qk = self.num_heads + self.num_kv_heads
        # Queries and keys lie side by side and are turned by the same angles: one rotation serves both.
        qk = self.rotary(self.normalize(qkv.narrow(1, 0, num_qk)), *cos_sin)  # [num_tokens, q and k heads, head_size]
        query = qk.narrow(1, 0, self.num_heads)  # [num_tokens, num_heads, head_size]
        key = qk.narrow(1, self.num_heads, self.num_kv_heads)  # [num_tokens, num_kv_heads, head_size]
        value = qkv.narrow(1, num_qk, self.num_kv_heads)  # [num_tokens, num_kv_heads, head_size]
        return self.o_proj(self.attn(query, key, value))  # [num_tokens, hidden_size]

    def normalize(self, qk: torch.Tensor) -> torch.Tensor:
        """Qwen3 normalises each head of qk [num_tokens, q and k heads, head_size]; Llama does not."""
        return qk


class LlamaMLP(nn.Module):
    def __init__(
        self,
        arch: ModelArchitecture,
        quant_config: QuantizationConfig | None,
        prefix: str,
        tp: Communicator = SINGLE_RANK,
    ) -> None:
        super().__init__()
        size, bias = arch.intermediate_size, arch.mlp_bias
        self.gate_up_proj = MergedColumnParallelLinear(
            arch.hidden_size, [size, size], bias=bias, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj", tp=tp
        )
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(
            size, arch.hidden_size, bias=bias, quant_config=quant_config, prefix=f"{prefix}.down_proj", tp=tp
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(hidden)))  # [num_tokens, hidden_size]


class LlamaDecoderLayer(nn.Module):
    attention_class: type[LlamaAttention] = LlamaAttention

    def __init__(
        self,
        arch: ModelArchitecture,
        quant_config: QuantizationConfig | None,
        prefix: str,
        tp: Communicator = SINGLE_RANK,
    ) -> None:
        super().__init__()
        self.self_attn = self.attention_class(arch, quant_config, f"{prefix}.self_attn", tp)
        self.mlp = LlamaMLP(arch, quant_config, f"{prefix}.mlp", tp)
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [num_tokens, hidden_size]. Each norm first adds what the previous block left to the residual."""
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos_sin)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class LlamaModel(nn.Module):
    """The layers of one stage: of the whole model, unless it is divided into a pipeline.

    The first stage has the embedding, the last one the final norm. A layer keeps its number in the whole model. E.g.
    the second of two stages of a model of 6 layers has model.layers.3, .4, .5 and model.norm.
    """

    def __init__(
        self,
        arch: ModelArchitecture,
        quant_config: QuantizationConfig | None,
        layer_class: type[LlamaDecoderLayer],
        groups: ParallelGroups = ONE_RANK,
    ) -> None:
        super().__init__()
        shard, tp = groups.shard, groups.tp
        if shard.is_first_stage or (shard.is_last_stage and arch.tie_word_embeddings):  # the head is then this table
            self.embed_tokens = VocabParallelEmbedding(arch.vocab_size, arch.hidden_size, tp=tp)
        self.layers = nn.ModuleList()
        for i in shard.layers(arch.num_hidden_layers):
            self.layers.add_module(str(i), layer_class(arch, quant_config, f"model.layers.{i}", tp))
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps) if shard.is_last_stage else None
        self.rotary_emb = RotaryEmbedding(arch.head_dim, arch.max_context_len, arch.rope)
        self.decoder_stack: RunLayers | None = None  # runs instead of `run_layers` (model_executor/cpu)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate: IntermediateTensors | None = None
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate is None:
            hidden = self.embed_tokens(input_ids)  # [num_tokens, hidden_size]
            residual = torch.zeros_like(hidden)
        else:
            hidden, residual = intermediate
        cos_sin = self.rotary_emb.cos_sin_at(positions, hidden.dtype)
        run_layers = self.decoder_stack or self.run_layers
        hidden, residual = run_layers(hidden, residual, cos_sin)  # [num_selected, hidden_size]
        return IntermediateTensors(hidden, residual) if self.norm is None else self.norm(hidden, residual)[0]

    def run_layers(
        self, hidden: torch.Tensor, residual: torch.Tensor, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs every layer on hidden and residual [num_tokens, hidden_size], and returns the rows that are read next.

        Those are the rows of `AttentionMetadata.logits_indices`: both results are [num_selected, hidden_size].
        """
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, cos_sin)
        selected = get_attn_metadata().logits_indices
        return (hidden, residual) if selected is None else (hidden[selected], residual[selected])


class LlamaForCausalLM(nn.Module):
    """What a model must offer the engine: forward, compute_logits, load_weights, attention_layers."""

    decoder_layer_class: type[LlamaDecoderLayer] = LlamaDecoderLayer

    # Our fused layer -> the checkpoint's layers in it, with the shard_id their weight_loader wants.
    packed_modules_mapping: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        "qkv_proj": [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")],
        "gate_up_proj": [("gate_proj", 0), ("up_proj", 1)],
    }

    def __init__(
        self,
        arch: ModelArchitecture,
        quant_config: QuantizationConfig | None = None,
        groups: ParallelGroups = ONE_RANK,
    ) -> None:
        """The part of the model that the rank of `groups` computes; `arch` describes the whole."""
        super().__init__()
        self.arch = arch
        self.model = LlamaModel(arch, quant_config, self.decoder_layer_class, groups)
        if not groups.shard.is_last_stage:
            return
        self.lm_head = ParallelLMHead(
            arch.hidden_size, arch.vocab_size, quant_config=quant_config, prefix="lm_head", tp=groups.tp
        )
        if arch.tie_word_embeddings:
            self.lm_head.tie_weights(self.model.embed_tokens)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate: IntermediateTensors | None = None
    ) -> torch.Tensor | IntermediateTensors:
        """input_ids and positions [num_tokens] -> hidden [num_selected, hidden_size], within a forward context.

        The selected rows are those of the context's `logits_indices`, or all of them if that is None. In a pipeline, a
        stage begins with the `intermediate` of the stage before it, and all but the last return their own.
        """
        return self.model(input_ids, positions, intermediate)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, hidden_size] -> logits [n, vocab_size]. Apart, as only rows that are sampled need it."""
        return self.lm_head(hidden)

    def attention_layers(self) -> list[Attention]:
        """In layer order; the model runner binds a backend and a slice of the KV cache to each."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load (checkpoint name, tensor) pairs; ValueError if any is missing, unknown or misshapen."""
        load_weights(self, weights, self.packed_modules_mapping)


class MistralForCausalLM(LlamaForCausalLM):
    """The same computation under another name: what Mistral adds, the sliding window, `parse_hf_config` refuses."""
