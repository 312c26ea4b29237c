"""accelerate: puts the fast CPU path into a loaded model, and answers with the list of what it replaced.

Milestone: M4. vLLM counterpart: none as one function; there each layer picks its own kernel (CustomOp,
dispatch_cpu_unquantized_gemm).

This is the only place that changes a model, and the worker calls it once, after the weights are loaded and before the
first step. At that moment packing saves memory too: each plain weight is dropped as soon as its packed copy exists.
What is replaced has a declared slot in the textbook model: `quant_method` of a linear layer, `impl` of a norm,
activation or rotation, `act_fn` of an MLP, `decoder_stack` of a LlamaModel, the backend of the sampler. Each
replacement names the engine argument that turns it off, and with all of them off (m1 to m3) nothing is replaced.

E.g. for SmolLM2-135M in bf16:

    linear_backend   121 x UnquantizedLinearMethod -> CppLinearMethod: ...
    fused_ops        61 x rms_norm -> csrc rms_norm: ...
    decoder_stack    30 layers, one after another -> one C++ call: ...
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from folovllm.attention.backend import AttentionBackend
from folovllm.config import KernelConfig
from folovllm.csrc.build import load_ops
from folovllm.model_executor.cpu.decoder_stack import stack_decoder_layers
from folovllm.model_executor.cpu.fused_ops import fuse_mlps, fuse_ops
from folovllm.model_executor.cpu.packed_linear import pack_linears
from folovllm.model_executor.cpu.replacement import Replacement, grouped
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.sample.sampler import Sampler

NO_OPS = "the C++ kernels could not be built or loaded (see the warning)"
DTYPES = (torch.float32, torch.bfloat16)  # of csrc/fused_ops.cpp


def accelerate(
    model: nn.Module,
    backend: AttentionBackend | None,
    kernels: KernelConfig,
    sampler: Any = None,
) -> list[Replacement]:
    """Replaces what `kernels` asks for and what can be replaced here; the rest stays plain, and the list says why.

    `backend` is the attention backend that the model will be bound to, and `sampler` the sampler that will run on its
    logits; either may be missing. Raises ValueError if `kernels` demands (True) what is impossible.
    """
    found = [*_accelerate_model(model, backend, kernels), *_accelerate_sampler(sampler, kernels, model)]
    replacements = grouped(found)
    for item in replacements:
        if item.after is None and getattr(kernels, item.switch) is True:
            raise ValueError(f"{item.switch}=True is impossible here: {item.why}. Use {item.switch}='auto' or False")
    return replacements


def _accelerate_model(
    model: nn.Module, backend: AttentionBackend | None, kernels: KernelConfig
) -> Iterable[Replacement]:
    """In this order: the MLP is fused from packed linears, and the decoder stack is built from everything before."""
    if kernels.linear_backend != "torch":
        ops, reason = _operators(model, kernels.cpu_isa) if kernels.linear_backend == "auto" else (None, "")
        yield from pack_linears(model, ops, kernels, reason)
    steps = {"fused_ops": fuse_ops, "fused_mlp": fuse_mlps}
    for switch, replace in steps.items():
        if getattr(kernels, switch) is not False:
            ops, reason = _operators(model, kernels.cpu_isa)
            yield from replace(model, ops) if ops is not None else [Replacement(switch, "the model", None, reason)]
    if kernels.decoder_stack is not False:
        yield from stack_decoder_layers(model, backend, kernels)


def _operators(model: nn.Module, isa: str) -> tuple[Any | None, str]:
    """Our C++ operators if they can run this model; else None and why."""
    weight = _plain_parameter(model)
    if weight.device.type != "cpu":
        return None, f"the kernels run on a CPU, and the model is on {weight.device.type}"
    if weight.dtype not in DTYPES:
        return None, f"the kernels compute in float32 and bfloat16, not in {str(weight.dtype).removeprefix('torch.')}"
    ops = load_ops(isa)
    return ops, "" if ops is not None else NO_OPS


def _plain_parameter(model: nn.Module) -> nn.Parameter:
    """Returns a parameter in the dtype of the activations.

    Those of linear layers may be quantised. In a pipeline only the first stage has an embedding, but all have norms.
    """
    others = (p for m in model.modules() if not isinstance(m, LinearBase) for p in m.parameters(recurse=False))
    return next(itertools.chain(others, model.parameters()))


def _accelerate_sampler(sampler: Any, kernels: KernelConfig, model: nn.Module) -> Iterable[Replacement]:
    """On a CPU sampling runs in C++; elsewhere, or without a compiler, on the largest logits instead of all of them."""
    if sampler is None or kernels.sampler_backend == "torch":
        return
    if not isinstance(sampler, Sampler):
        yield Replacement("sampler_backend", type(sampler).__name__, None, "it is no Sampler of ours")
        return
    if own := sampler.own_steps():
        yield Replacement("sampler_backend", type(sampler).__name__, None, f"it has {', '.join(own)} of its own")
        return
    on_cpu = next(model.parameters()).device.type == "cpu"
    ops = load_ops(kernels.cpu_isa) if on_cpu and kernels.sampler_backend == "auto" else None
    before = sampler.backend
    sampler.use_backend("shortlist" if ops is None else "cpp", ops)
    why = "one pass over the logits, without a sort" if ops is not None else "no sort of the whole vocabulary"
    yield Replacement("sampler_backend", f"{before} sampling", f"{sampler.backend} sampling", why)
