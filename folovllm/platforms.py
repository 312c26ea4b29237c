"""What the hardware can do, found out once at start-up.

Milestone: M0. vLLM counterpart: vllm/platforms.
"""

import torch

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
    """Returns whether `device` multiplies bfloat16 in hardware. Emulated bfloat16 is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
