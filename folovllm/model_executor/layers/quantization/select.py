"""Which kernel multiplies with the weights of a GPTQ checkpoint.

Milestone: M7. vLLM counterpart: choose_mp_linear_kernel
(vllm/model_executor/layers/quantization/kernels/mixed_precision).
"""

import warnings
from collections.abc import Callable

from folovllm.csrc.build import load_ops
from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.cpu.int4_kernel import CpuInt4Kernel, int4_refusal
from folovllm.model_executor.layers.quantization.kernels import DequantKernel, GPTQKernel, KernelOptions


def _triton(config: GPTQConfig, options: KernelOptions) -> GPTQKernel:
    """Triton is not everywhere, and decides when it is imported whether it compiles kernels or interprets them."""
    try:
        from folovllm.model_executor.layers.quantization.triton_gptq import TritonGPTQKernel
    except ImportError as error:
        raise ValueError(str(error)) from None
    return TritonGPTQKernel(config, options)


KERNELS: dict[str, Callable[[GPTQConfig, KernelOptions], GPTQKernel]] = {
    "dequant": DequantKernel,
    "cpu_int4": CpuInt4Kernel,
    "triton": _triton,
}


def get_kernel(name: str, config: GPTQConfig, options: KernelOptions | None = None) -> GPTQKernel:
    """The kernel called `name`; ValueError with the names there are, or with why it cannot run this."""
    if name not in KERNELS:
        raise ValueError(f"unknown GPTQ kernel {name!r}; there are {', '.join(KERNELS)}")
    return KERNELS[name](config, options or KernelOptions())


def choose_kernel(config: GPTQConfig, options: KernelOptions, linear_backend: str) -> str | None:
    """For gptq_kernel="auto": the fastest kernel that can run `config`, or plain torch unless linear_backend is "auto".

    Returns None if nothing here is fast with packed weights: then they should be dequantised while they are loaded.
    """
    if linear_backend != "auto":
        return "dequant"
    reason = int4_refusal(config, options)
    if reason is None:
        return "cpu_int4"
    if options.runtime == "memory":
        return "dequant"
    if load_ops(options.cpu_isa) is not None:  # if it is None, there was a warning
        warnings.warn(
            f"the weights are dequantised while they are loaded, as cpu_int4 {reason}; "
            f"gptq_runtime='memory' keeps them packed, but computes slowly",
            stacklevel=2,
        )
    return None
