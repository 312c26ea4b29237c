"""Milestone M4 without weights: one ragged batch, every backend that runs here, one answer; the largest tensor of each.

Run: python milestones/m4/demo.py
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.selector import BACKENDS, auto_backend, load_backend, refusal

HEADS, KV_HEADS, SIZE, BLOCK = 9, 3, 64, 16  # SmolLM2-135M
spec = AttentionSpec(HEADS, KV_HEADS, SIZE, torch.float32, torch.device("cpu"), BLOCK)
SEQUENCES = [(0, 600), (500, 70), (900, 1), (33, 1)]  # (in the cache, new): a prompt, a chunk, two decodes
totals, news = [old + new for old, new in SEQUENCES], [new for _, new in SEQUENCES]


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor made while it is active; views are not made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not any(r.alias_info for r in func._schema.returns):
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


def batch(counts: list[int], table: torch.Tensor) -> AttentionMetadata:
    """A step that computes the last `counts` tokens of each sequence."""
    start = [sum(counts[:i]) for i in range(len(counts) + 1)]
    places = [(i, p) for i, n in enumerate(counts) for p in range(totals[i] - n, totals[i])]
    slots = torch.tensor([int(table[i, p // BLOCK]) * BLOCK + p % BLOCK for i, p in places])
    return AttentionMetadata(start, totals, table, slots, BLOCK)


torch.manual_seed(4)
table = (1 + torch.randperm(4 * 60)).view(4, 60).int()  # blocks anywhere
key, value = torch.randn(2, sum(totals), KV_HEADS, SIZE)
query = torch.randn(sum(news), HEADS, SIZE)
answers, sizes = {}, {}
for name in BACKENDS:
    if reason := refusal(name, spec):
        print(f"{name:12} does not run here: {reason.splitlines()[0][:90]}")
        continue
    backend, everything, step = load_backend(name)(spec), batch(totals, table), batch(news, table)
    cache = torch.full(backend.kv_cache_shape(1 + 4 * 60), float("nan"))  # unwritten slots must not be read
    backend.write(key, value, cache, everything)
    backend.prepare(step)
    with Largest() as largest:
        answers[name], sizes[name] = backend.forward(query, cache, step), largest
    error = (answers[name] - answers["torch_naive"]).abs().max()
    print(f"{name:12} largest tensor {largest.nbytes / 2**20:6.2f} MiB, differs from torch_naive by {error:.1e}")
    assert error < 1e-5
print(f"auto takes {auto_backend(spec)}")
assert sizes["torch_flash"].nbytes < sizes["torch_naive"].nbytes / 5 and len(answers) >= 3
