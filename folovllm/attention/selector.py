"""Choosing the attention backend: a lazy registry, `auto`, and refusals that name the alternative.

Milestone: M1 (more entries with M4). vLLM counterpart: vllm/attention/selector.py.
"""

from collections.abc import Mapping

from folovllm.attention.backend import AttentionBackend, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.slots import resolve

SLOT = "attention.backend"
BACKENDS: dict[str, type[AttentionBackend]] = {TorchNaiveBackend.name: TorchNaiveBackend}


def get_attn_backend(name: str, spec: AttentionSpec, overrides: Mapping[str, str] | None = None) -> AttentionBackend:
    """Build the backend called `name` for `spec`, or the one that fills the slot; ValueError if it cannot run it."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention_backend {name!r}; available: {', '.join(BACKENDS)}")
    backend = resolve(SLOT, overrides) if SLOT in (overrides or {}) else BACKENDS[name]
    reason = backend.refusal(spec)
    if reason is not None:
        raise ValueError(f"attention_backend={name!r} cannot run here: {reason}")
    return backend(spec)
