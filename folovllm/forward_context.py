"""The forward context: what attention layers need in a step but model code should not have to pass along.

Milestone: M1. vLLM counterpart: vllm/forward_context.py. It is the only global state of the engine, set around each
forward pass, so that model files read like the paper: `self.attn(q, k, v)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from folovllm.attention.backend import AttentionMetadata

_attn_metadata: ContextVar[AttentionMetadata] = ContextVar("attn_metadata")


@contextmanager
def set_forward_context(attn_metadata: AttentionMetadata) -> Iterator[None]:
    """Make `attn_metadata` visible to the attention layers while the body runs."""
    token = _attn_metadata.set(attn_metadata)
    try:
        yield
    finally:
        _attn_metadata.reset(token)


def get_attn_metadata() -> AttentionMetadata:
    """Metadata of the running step. Only code that runs inside a forward pass may call it."""
    return _attn_metadata.get()
