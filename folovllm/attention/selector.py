"""Choosing the attention backend: a lazy registry, `auto`, and refusals that name the reason and the alternative.

Milestone: M1 (all backends but torch_naive arrive with M4). vLLM counterpart: vllm/attention/selector.py, which asks
vllm/platforms/cpu.py or vllm/platforms/cuda.py for the backend. Left out: backends per layer.

The registry is lazy: the file of a backend is imported only when that backend is asked for, so an engine does not need
the kernel libraries of backends that it does not run. If the import fails, that is a refusal like any other.
"""

import logging
from collections.abc import Mapping

from folovllm.attention.backend import AttentionBackend, AttentionSpec
from folovllm.parts import load_part
from folovllm.utils import unknown_name_message

logger = logging.getLogger(__name__)

PART = "attention.backend"
AUTO = "auto"
_HOME = "folovllm.attention.backends"
# config.ATTENTION_BACKENDS lists the same names, because config.py is plain data and cannot import this file.
BACKENDS: dict[str, str] = {
    "torch_naive": f"{_HOME}.torch_naive:TorchNaiveBackend",  # the oracle
    "torch_sdpa": f"{_HOME}.torch_sdpa:TorchSdpaBackend",  # torch's own fused kernel on gathered K and V
    "torch_flash": f"{_HOME}.torch_flash:TorchFlashBackend",  # tiles in plain torch, to be read
    "cpu_paged": f"{_HOME}.cpu_paged:CpuPagedBackend",  # C++
    "triton_paged": f"{_HOME}.triton_paged:TritonPagedBackend",  # our GPU kernels
    "flash_attn": f"{_HOME}.flash_attn:FlashAttnBackend",  # FlashAttention's own GPU kernels
}
# Best first. The last one of each list runs everywhere, so `auto` always finds a backend.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("flash_attn", "triton_paged", "torch_sdpa"),  # not measured yet: docs/dev/gpu_status.md
    "cpu": ("cpu_paged", "torch_sdpa"),
}


def get_attn_backend(name: str, spec: AttentionSpec, parts: Mapping[str, str] | None = None) -> AttentionBackend:
    """Builds the backend called `name` for `spec`, or the one in `parts`. Raises ValueError if it cannot run here."""
    if parts and PART in parts:
        return _from_parts(spec, parts)
    if name == AUTO:
        name = auto_backend(spec)
    elif name not in BACKENDS:
        raise ValueError(unknown_name_message("attention_backend", name, [AUTO, *BACKENDS]))
    reason = refusal(name, spec)
    if reason is not None:
        raise ValueError(
            f"attention_backend={name!r} cannot run here: {reason}. Use attention_backend='auto', which takes the best "
            f"that can, or {AUTO_ORDER[spec.device.type][-1]!r}, which runs everywhere"
        )
    return load_backend(name)(spec)


def auto_backend(spec: AttentionSpec) -> str:
    """Returns the name of the best backend that can run `spec`, and logs why the better ones cannot."""
    order = AUTO_ORDER[spec.device.type]
    for name in order:
        reason = refusal(name, spec)
        if reason is None:
            return name
        logger.info("attention_backend='auto' passes over %s: %s", name, reason)
    raise AssertionError(f"{order[-1]} is meant to run everywhere")


def refusal(name: str, spec: AttentionSpec) -> str | None:
    """Returns why the backend called `name` cannot run `spec` here, or None if it can."""
    try:
        backend = load_backend(name)
    except (ValueError, ImportError) as error:  # a library that it needs is missing or broken
        return str(error)
    return backend.refusal(spec)


def load_backend(name: str) -> type[AttentionBackend]:
    """Imports a registered backend. Raises ValueError or ImportError if its file needs a missing library."""
    # `load_part` is the only place that imports by name, so the backend is passed to it as if a user had named it.
    backend: type[AttentionBackend] = load_part(PART, {PART: BACKENDS[name]})
    return backend


def _from_parts(spec: AttentionSpec, parts: Mapping[str, str]) -> AttentionBackend:
    backend: type[AttentionBackend] = load_part(PART, parts)
    reason = backend.refusal(spec)
    if reason is not None:
        raise ValueError(f"{parts[PART]} as part {PART!r} cannot run here: {reason}")
    return backend(spec)
