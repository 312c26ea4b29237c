"""All decoder layers as one C++ call, where everything they are made of is C++ already.

Milestone: M4. vLLM counterpart: none on a CPU; on a GPU, CUDA graphs (which replay all launches of a step) serve the
same end. Left out: plain fp32 layers, which run operator by operator.

With one token per step the twelve modules, views and operator calls of a layer cost as much Python as a seventh of its
arithmetic, and one call per layer still a tenth. The model file stays as it is: its layers are called as ever unless
this stands in for their loop, and whoever wants to read what they do reads it there. csrc/layer.cpp does the same in
the same order.
"""

from typing import Any

import torch
from torch import nn

from folovllm.attention.backend import AttentionBackend
from folovllm.attention.backends.cpu_paged import CpuPagedBackend
from folovllm.forward_context import get_attn_metadata
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.packed_linear import CppGatedLinearMethod, CppLinearMethod
from folovllm.model_executor.layers.quantization.cpu_int4 import Int4LinearMethod, int4_tensors
from folovllm.model_executor.models.interface import CausalLM
from folovllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel

CosSin = tuple[torch.Tensor, torch.Tensor]


class FusedDecoderLayers:
    """Stands in for `LlamaModel.run_layers`."""

    def __init__(self, layers: list[LlamaDecoderLayer], backend: CpuPagedBackend) -> None:
        first = layers[0]
        self._op = backend.ops.decoder_layers.default
        self._kv_caches = [layer.self_attn.attn.kv_cache for layer in layers]
        self._weights = [weight for layer in layers for weight in fused_weights(layer)]
        self._sizes = (first.self_attn.num_heads, first.mlp.gate_up_proj.output_size // 2)
        self._eps, self._scale = first.input_layernorm.eps, backend.spec.scale
        self._max_int4_rows = max(map(max_int4_rows, layers))

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layers: hidden and residual [num_tokens, hidden_size], cos_sin of the positions."""
        metadata = get_attn_metadata()
        prepared = metadata.prepared
        out = self._op(
            hidden,
            residual,
            *cos_sin,
            self._weights,
            self._kv_caches,
            metadata.slot_mapping,
            prepared.query_start_loc,
            prepared.seq_lens,
            metadata.block_table,
            *self._sizes,
            self._eps,
            self._scale,
            self._max_int4_rows,
            metadata.ends_only,
        )  # [num_tokens, hidden_size]
        return out, residual


def fuse_decoder_layers(model: CausalLM, backend: AttentionBackend) -> bool:
    """Let the layers run as one call if all of them can; whether they do. Call it when they are bound to `backend`."""
    modules = model.modules() if isinstance(model, nn.Module) else ()  # a test's model may be anything
    fused = False
    for stack in [module for module in modules if isinstance(module, LlamaModel)]:
        layers = [layer for layer in stack.layers if isinstance(layer, LlamaDecoderLayer)]
        if layers and all(_can_fuse(layer, backend) for layer in layers):
            assert isinstance(backend, CpuPagedBackend) and len(layers) == len(stack.layers)
            stack.run_layers = FusedDecoderLayers(layers, backend)  # type: ignore[method-assign]
            fused = True
    return fused


def fused_weights(layer: LlamaDecoderLayer) -> list[torch.Tensor]:
    """In the order of csrc/layer.cpp; an empty tensor where the model has none."""
    attention, mlp = layer.self_attn, layer.mlp
    tensors: list[Any] = [
        layer.input_layernorm.weight,
        *_linear_weights(attention.qkv_proj),
        *(getattr(getattr(attention, norm, None), "weight", None) for norm in ("q_norm", "k_norm")),
        *_linear_weights(attention.o_proj),
        layer.post_attention_layernorm.weight,
        *_linear_weights(mlp.gate_up_proj),
        *_linear_weights(mlp.down_proj),
    ]
    none = torch.empty(0)
    return [none if tensor is None else tensor.detach() for tensor in tensors]


def _linear_weights(linear: LinearBase) -> list[Any]:
    return int4_tensors(linear) or [linear.packed_weight, linear.packed_bias]


def max_int4_rows(layer: LlamaDecoderLayer) -> int:
    """Up to how many tokens 4 bits are used where a layer has bf16 as well; 0 where no layer has 4 bits."""
    method = layer.mlp.down_proj.quant_method
    return method.kernel.max_int4_rows if isinstance(method, Int4LinearMethod) else 0


def _can_fuse(layer: LlamaDecoderLayer, backend: AttentionBackend) -> bool:
    """Exactly these classes: a subclass may compute something else."""
    attention, mlp = layer.self_attn, layer.mlp
    linears, gate_up = (attention.qkv_proj, attention.o_proj, mlp.down_proj), mlp.gate_up_proj
    return (
        type(backend) is CpuPagedBackend
        and backend.padding == 0
        and all(type(linear.quant_method) is CppLinearMethod or _is_one_int4(linear, False) for linear in linears)
        and (type(gate_up.quant_method) is CppGatedLinearMethod or _is_one_int4(gate_up, True))
    )


def _is_one_int4(linear: LinearBase, gated: bool) -> bool:
    method = linear.quant_method
    return type(method) is Int4LinearMethod and method.gated == gated and int4_tensors(linear) is not None
