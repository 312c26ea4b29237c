"""What an engine runs: the method of each layer, attention backend, sampler, memory, threads, and what was replaced.

Milestone: M4. vLLM counterpart: none; its selectors log single lines at start. `folovllm info --engine` prints it, and
`LLM` logs it at DEBUG.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from folovllm.csrc.build import compiled_for, loaded_ops
from folovllm.model_executor.layers.activation import SiluAndMul
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.rotary_embedding import ApplyRotary
from folovllm.model_executor.models.llama import LlamaModel
from folovllm.worker.worker import Worker

FUSABLE = (RMSNorm, SiluAndMul, ApplyRotary)


def describe_worker(worker: Worker) -> dict[str, Any]:
    """Plain data, for people to read."""
    runner, kernels = worker.model_runner, worker.config.kernel_config
    sampler = runner.sampler
    return {
        "model": type(runner.model).__name__,
        "dtype": worker.config.model_config.dtype,
        "layers": _layers(runner.model) if isinstance(runner.model, nn.Module) else [],
        "attention": runner.backend.name,
        "sampler": f"{type(sampler).__name__}, {getattr(sampler, 'backend', 'its own')}",
        "memory": {
            "huge_pages": kernels.huge_pages,
            "touch_kv_pages": kernels.touch_kv_pages,
            "keep_freed_memory": worker.keeps_freed_memory,
        },
        "C++ kernels": _kernels(kernels.cpu_isa),
        "threads": worker.config.cpu_threads or torch.get_num_threads(),
        "replaced": [str(item) for item in worker.replacements if item.after is not None],
        "stays plain": [str(item) for item in worker.replacements if item.after is None],
    }


def _kernels(isa: str) -> str:
    """E.g. "cpu_isa='avx2', compiled for avx2 f16c fma"."""
    ops = loaded_ops(isa)
    return "none" if ops is None else f"cpu_isa={isa!r}, compiled for {' '.join(sorted(compiled_for(ops)))}"


def _layers(model: nn.Module) -> list[str]:
    """E.g. ["30 x QKVParallelLinear: CppLinearMethod", ..., "30 x LlamaDecoderLayer: one C++ call"]."""
    return [f"{count} x {kind}: {method}" for (kind, method), count in Counter(_methods(model)).items()]


def _methods(model: nn.Module) -> Iterable[tuple[str, str]]:
    for module in model.modules():
        if isinstance(module, LinearBase):
            yield type(module).__name__, type(module.quant_method).__name__
        elif isinstance(module, FUSABLE):
            yield type(module).__name__, "C++" if "impl" in vars(module) else "torch"
        elif isinstance(module, LlamaModel):
            how = "module by module" if module.decoder_stack is None else "all in one C++ call"
            yield from ((type(layer).__name__, how) for layer in module.layers)
