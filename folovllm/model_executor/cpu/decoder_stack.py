"""All decoder layers as one C++ call, if everything that they are made of is C++ already.

Milestone: M4. vLLM counterpart: none on a CPU; on a GPU, CUDA graphs (which replay all launches of a step) serve the
same end. Left out: plain fp32 layers, which run operator by operator.

With one token per step the twelve modules, views and operator calls of a layer cost as much Python as a seventh of its
arithmetic, and even one call per layer costs a tenth. The textbook loop stays in the model file: LlamaModel calls its
`decoder_stack` instead of the loop if there is one. csrc/decoder_stack.cpp performs the same
operations in the same order. In a pipeline each stage has a stack of its own layers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from folovllm.attention.backend import AttentionBackend
from folovllm.attention.backends.cpu_paged import CpuPagedBackend
from folovllm.attention.layer import Attention
from folovllm.config import KernelConfig
from folovllm.forward_context import get_attn_metadata
from folovllm.model_executor.cpu.int4_kernel import Int4LinearMethod, single_int4_part
from folovllm.model_executor.cpu.packed_linear import CppGatedLinearMethod, CppLinearMethod
from folovllm.model_executor.cpu.replacement import Replacement
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.rotary_embedding import ApplyRotary
from folovllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
from folovllm.model_executor.models.qwen3 import Qwen3Attention

CosSin = tuple[torch.Tensor, torch.Tensor]
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class DecoderStack:
    """What LlamaModel calls instead of its loop over the layers."""

    def __init__(self, layers: list[LlamaDecoderLayer], backend: CpuPagedBackend) -> None:
        first = layers[0]
        self._run = backend.ops.decoder_stack.default
        self._stack = getattr(torch.classes, backend.ops.name).DecoderStack(
            first.self_attn.num_heads,
            first.mlp.gate_up_proj.output_size // 2,
            first.input_layernorm.eps,
            backend.spec.scale,
            max(map(max_int4_rows, layers)),
        )
        for layer in layers:
            self._stack.add_layer(named_tensors(layer))
        self._attention = [layer.self_attn.attn for layer in layers]

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden, residual [num_tokens, hidden_size] -> both [num_selected, hidden_size], as LlamaModel.run_layers."""
        metadata = get_attn_metadata()
        prepared = metadata.prepared
        result: tuple[torch.Tensor, torch.Tensor] = self._run(
            self._stack,
            hidden,
            residual,
            *cos_sin,
            [attention.kv_cache for attention in self._attention],
            metadata.slot_mapping,
            prepared.query_start_loc,
            prepared.seq_lens,
            metadata.block_table,
            metadata.logits_indices,
        )
        return result


def stack_decoder_layers(
    model: nn.Module, backend: AttentionBackend | None, kernels: KernelConfig
) -> Iterator[Replacement]:
    """Gives every LlamaModel in `model` a decoder stack if all of its layers fit into one."""
    models = [module for module in model.modules() if isinstance(module, LlamaModel)]
    if not models:
        yield Replacement("decoder_stack", type(model).__name__, None, "there is no LlamaModel in it")
    for llama in models:
        before = f"{len(llama.layers)} decoder layers, one after another"
        reason = _switched_off(kernels) or _backend_refusal(backend) or _model_refusal(llama)
        if reason is None:
            assert isinstance(backend, CpuPagedBackend)
            llama.decoder_stack = DecoderStack(list(llama.layers), backend)  # type: ignore[arg-type]
        after = None if reason else "one C++ call"
        yield Replacement("decoder_stack", before, after, reason or "no Python between the layers")


def named_tensors(layer: LlamaDecoderLayer) -> dict[str, torch.Tensor]:
    """The tensors of a layer under the names that csrc/decoder_stack.cpp asks for, without those the model lacks."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = {
        "input_layernorm": layer.input_layernorm,
        "post_attention_layernorm": layer.post_attention_layernorm,
        "q_norm": getattr(attention, "q_norm", None),
        "k_norm": getattr(attention, "k_norm", None),
    }
    tensors = {name: norm.weight.detach() for name, norm in norms.items() if norm is not None}
    for name in LINEARS:
        linear = getattr(attention if hasattr(attention, name) else mlp, name)
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in linear_tensors(linear).items()}
    return tensors


def linear_tensors(linear: LinearBase) -> dict[str, torch.Tensor]:
    """The weight of a packed or an int4 layer by the names of csrc/decoder_stack.cpp's Linear."""
    part = single_int4_part(linear)
    if part is not None:
        return part.tensors
    tensors: dict[str, Any] = {"packed": linear.packed_weight, "bias": linear.packed_bias}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def max_int4_rows(layer: LlamaDecoderLayer) -> int:
    """Up to how many tokens 4 bits are used if a layer has bf16 as well; 0 if no layer has 4 bits."""
    method = layer.mlp.down_proj.quant_method
    return method.kernel.max_int4_rows if isinstance(method, Int4LinearMethod) else 0


def _switched_off(kernels: KernelConfig) -> str | None:
    """The stack computes norms and activations in C++, so it must not undo what another switch turned off."""
    off = [name for name in ("fused_ops", "fused_mlp") if getattr(kernels, name) is False]
    return f"{' and '.join(off)} off" if off else None


def _backend_refusal(backend: AttentionBackend | None) -> str | None:
    if type(backend) is not CpuPagedBackend:
        name = "another attention backend" if backend is None else backend.name
        return f"the attention in it is cpu_paged's, and the model runs on {name}"
    if backend.padding:
        return f"a head of {backend.spec.head_size} is padded in Python"
    return None


def _model_refusal(model: LlamaModel) -> str | None:
    if type(model).forward is not LlamaModel.forward or type(model).run_layers is not LlamaModel.run_layers:
        return f"{type(model).__name__} has a loop of its own"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.layers.modules()):
        return "a module has forward hooks, which the call would pass by"
    if any(module.tp.size > 1 for module in model.layers.modules() if isinstance(module, LinearBase)):
        return "tensor parallelism adds up the ranks' sums within each layer, where one call cannot be interrupted"
    reasons = [_layer_refusal(layer) for layer in model.layers]
    return next(filter(None, reasons), None) if reasons else "it has no layers"


def _layer_refusal(layer: nn.Module) -> str | None:
    """None if `layer` computes what csrc/decoder_stack.cpp does: a subclass with a forward of its own may not."""
    if type(layer).forward is not LlamaDecoderLayer.forward:
        return f"{type(layer).__name__} computes something else than LlamaDecoderLayer"
    assert isinstance(layer, LlamaDecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    known = (LlamaAttention, Qwen3Attention)
    if type(attention) not in known or type(mlp) is not LlamaMLP:
        return f"{type(attention).__name__} or {type(mlp).__name__} may compute something else than our own classes"
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    for expected, modules in ((Attention, [attention.attn]), (ApplyRotary, [attention.rotary]), (RMSNorm, norms)):
        if any(type(module) is not expected for module in modules):
            return f"a module is no {expected.__name__} of ours"
    linears = {name: getattr(attention if hasattr(attention, name) else mlp, name) for name in LINEARS}
    odd = [f"{name} runs on {type(ln.quant_method).__name__}" for name, ln in linears.items() if not _fits(name, ln)]
    return f"not every linear layer is C++: {odd[0]}" if odd else None


def _fits(name: str, linear: LinearBase) -> bool:
    method, gated = linear.quant_method, name == "gate_up_proj"
    if type(method) is Int4LinearMethod:
        return method.gated == gated and single_int4_part(linear) is not None
    return type(method) is (CppGatedLinearMethod if gated else CppLinearMethod)
