"""What the hardware can do, found out once at start-up.

Milestone: M0. vLLM counterpart: vllm/platforms.
"""

import torch

from folovllm.config import KernelConfig
from folovllm.cpus import CpuCount, usable_cpus
from folovllm.csrc.build import compiled_for, load_ops
from folovllm.csrc.levels import cpu_capabilities

AMPERE = (8, 0)  # compute capability; the first GPUs that multiply bfloat16


def choose_device(device: str) -> str:
    """Returns the device for `device`: "auto" means "cuda" if there is a GPU, else "cpu". Raises ValueError if CUDA is
    missing.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError(
            "device='cuda' was asked for but torch sees no CUDA device; use device='cpu', or install a CUDA build of "
            "torch (see README.md)"
        )
    return ("cuda" if available else "cpu") if device == "auto" else device


def has_native_bf16(device: str) -> bool:
    """Returns whether torch multiplies bfloat16 in hardware on `device`. What it emulates is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = cpu_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_fast_bf16(device: str, kernels: KernelConfig) -> bool:
    """Returns whether an engine is faster in bfloat16 than in float32, so that `dtype="auto"` means bfloat16.

    Our kernels read bfloat16 weights, which are half as many bytes, and turn them into float32 in vector registers. So
    they need no bfloat16 instructions, only vectors: those of AVX2, AVX-512 or NEON. Builds the kernels if necessary.
    """
    if has_native_bf16(device):
        return True
    ops = load_ops(kernels.cpu_isa) if device == "cpu" and kernels.linear_backend == "auto" else None
    return ops is not None and not compiled_for(ops).isdisjoint({"avx2", "neon"})


def default_threads() -> CpuCount:
    """Returns the threads that compute without `cpu_threads`: those of torch, or fewer if there are fewer usable CPUs.

    torch counts the physical cores of the affinity mask when it is loaded, unless OMP_NUM_THREADS or
    `torch.set_num_threads` gives a number. It ignores CPU quotas, such as that of a container.
    """
    threads, usable = torch.get_num_threads(), usable_cpus()
    return usable if usable.number < threads else CpuCount(threads, "torch.get_num_threads()")


def refusal_of_gpu(device: torch.device) -> str | None:
    """Returns why kernels for NVIDIA GPUs from Ampere on cannot run on `device`, or None if they can.

    The text is the end of a sentence whose subject is the kernel, such as "runs on an NVIDIA GPU, not on cpu".
    """
    if device.type != "cuda":
        return f"runs on an NVIDIA GPU, not on {device.type}"
    if not torch.cuda.is_available():
        return "cannot run because torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < AMPERE:
        return f"wants compute capability 8.0 (Ampere) or later, this GPU has {'.'.join(map(str, capability))}"
    return None
