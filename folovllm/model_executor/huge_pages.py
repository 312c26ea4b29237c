"""Tensors in huge pages: for what every step reads from end to end, the packed weights and the KV cache.

Milestone: M4. vLLM counterpart: none (its documentation asks the user to preload an allocator). Linux only; elsewhere
these are ordinary tensors.

The CPU finds a page's address in a cache of some 3,000 entries (the TLB). With pages of 4 KiB that is 12 MiB of memory;
weights are hundreds, so every page costs a walk through the page tables, on a virtual machine through two sets of them,
and the hardware prefetcher stops at its edge. A page of 2 MiB is one entry. On 2 cores of a cloud machine a plain loop
over 128 MiB read 1.4 to 1.9 times as many bytes per second.
"""

import contextlib
import math
import mmap

import torch

CHUNK_BYTES = 64 * 2**20
ALIGNMENT = 64  # bytes: a line of the cache


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU; the operating system provides each page when it is first written, so unused ones cost nothing.

    Only asked for: where the system has no huge page left, it gives ordinary ones.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # Private: shared memory, Python's default, gets huge pages only where the administrator said so.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes).view(dtype).view(shape)


class HugeArena:
    """Moves tensors, one after another, into a few large pieces of memory: a weight alone rarely fills a huge page."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `tensor` in the arena. The memory lives as long as any tensor in it."""
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + num_bytes > self._chunk.numel():
            self._chunk = huge_zeros((max(num_bytes, self._chunk_bytes),), torch.uint8)
            start = 0
        self._used = start + num_bytes
        return self._chunk[start : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)
