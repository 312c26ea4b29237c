"""Choosing the attention backend: a lazy registry, `auto`, and refusals that name the alternative.

Milestone: M1 (more entries with M4). vLLM counterpart: vllm/attention/selector.py.
"""

from folovllm.attention.backend import AttentionBackend, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend

BACKENDS: dict[str, type[AttentionBackend]] = {TorchNaiveBackend.name: TorchNaiveBackend}


def get_attn_backend(name: str, spec: AttentionSpec) -> AttentionBackend:
    """Build the backend called `name` for `spec`; ValueError if it cannot run it."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention_backend {name!r}; available: {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    reason = backend.refusal(spec)
    if reason is not None:
        raise ValueError(f"attention_backend={name!r} cannot run here: {reason}")
    return backend(spec)
