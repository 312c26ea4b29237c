"""Which kernel multiplies with the weights of a GPTQ checkpoint.

Milestone: M7. vLLM counterpart: choose_mp_linear_kernel
(vllm/model_executor/layers/quantization/kernels/mixed_precision).
"""

from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.layers.quantization.cpu_int4 import CpuInt4Kernel, int4_refusal
from folovllm.model_executor.layers.quantization.kernels import DequantKernel, GPTQKernel, KernelOptions

KERNELS: dict[str, type[GPTQKernel]] = {"dequant": DequantKernel, "cpu_int4": CpuInt4Kernel}


def get_kernel(name: str, config: GPTQConfig, options: KernelOptions | None = None) -> GPTQKernel:
    """The kernel called `name`; ValueError with the names there are, or with why it cannot run this."""
    if name not in KERNELS:
        raise ValueError(f"unknown GPTQ kernel {name!r}; there are {', '.join(KERNELS)}")
    return KERNELS[name](config, options or KernelOptions())


def choose_kernel(config: GPTQConfig, options: KernelOptions, linear_backend: str) -> str:
    """For gptq_kernel="auto": the fastest that can run it, but plain torch where linear_backend asks for that."""
    if linear_backend != "auto":
        return "dequant"
    return "cpu_int4" if int4_refusal(config, options) is None else "dequant"
