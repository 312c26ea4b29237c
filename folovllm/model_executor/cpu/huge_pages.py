"""Memory: huge pages for what every step reads from end to end (packed weights, KV cache), and a malloc that keeps it.

Milestone: M4. Engine arguments: huge_pages, touch_kv_pages, keep_freed_memory. vLLM counterpart: none (its
documentation asks the user to preload an allocator). Linux only; elsewhere these are ordinary tensors.

The CPU finds a page's address in a cache of some 3,000 entries (the TLB). With pages of 4 KiB that is 12 MiB of memory;
weights are hundreds, so every page costs a walk through the page tables, on a virtual machine through two sets of them,
and the hardware prefetcher stops at its edge. A page of 2 MiB is one entry. On 2 cores of a cloud machine a plain loop
over 128 MiB read 1.4 to 1.9 times as many bytes per second.
"""

import contextlib
import ctypes
import math
import mmap
import time

import torch

from folovllm.utils import round_up

# glibc's mallopt: its parameters and our values. 32 MiB is the most that it accepts for the first.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_FROM_HEAP, _KEPT_FREE = 32 * 2**20, 512 * 2**20
SMALLEST_PAGE = 4096
TOUCHED_AT_ONCE = 128 * 2**20  # bytes: two threads share the work only if it is this much
CHUNK_BYTES = 64 * 2**20
ALIGNMENT = 64  # bytes: a line of the cache


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype, huge_pages: bool = True) -> torch.Tensor:
    """Zeros on the CPU. The operating system provides each page when it is first written, so unused ones cost nothing.

    Huge pages are only asked for: if the system has none left, it gives ordinary ones. With `huge_pages` False the
    pages are ordinary even on a system that hands out huge ones unasked.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # Private: shared memory, Python's default, gets huge pages only if the administrator allowed it.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        pages.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes).view(dtype).view(shape)


def touch_pages(zeros: torch.Tensor, num_bytes: int, seconds: float) -> int:
    """Makes the system provide pages of fresh `zeros` `[layers, ...]` now, from the beginning of each layer on.

    Returns the number of bytes: about `num_bytes`, or fewer if `seconds` have passed before. If a page is first
    written in a step, the step pays for its zeroing, and on a virtual machine whose host must find the memory first, it
    pays far more: there the first prompts of a process took a sixth longer than the next ones.
    """
    layers = zeros.view(zeros.shape[0], -1).view(torch.uint8)  # [layers, bytes]
    step = max(SMALLEST_PAGE, TOUCHED_AT_ONCE // len(layers))
    end = min(layers.shape[1], num_bytes // len(layers))
    deadline = time.monotonic() + seconds
    for start in range(0, end, step):
        if time.monotonic() >= deadline:
            return len(layers) * start
        layers[:, start : min(start + step, end) : SMALLEST_PAGE].zero_()
    return len(layers) * end


def keep_freed_memory() -> bool:
    """Lets malloc keep the memory of freed tensors instead of returning it. Returns False if malloc is not glibc's.

    The setting belongs to the process: once made, it stays, also for engines that are built later. Every step allocates
    and frees the same few megabytes. By default glibc returns them each time, and the next step pays a page fault,
    zeroing included, for every 4 KiB. Whether it does depends on the order of sizes that the process happened to free
    first: the same engine ran at 110 or at 160 tokens per second.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP) and mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE))


class HugeArena:
    """Moves tensors, one after another, into a few large pieces of memory: a weight alone rarely fills a huge page."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, huge_pages: bool = True) -> None:
        self._chunk_bytes, self._huge_pages = chunk_bytes, huge_pages
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `tensor` in the arena. The memory lives as long as any tensor in it."""
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        start = round_up(self._used, ALIGNMENT)
        if start + num_bytes > self._chunk.numel():
            self._chunk = huge_zeros((max(num_bytes, self._chunk_bytes),), torch.uint8, self._huge_pages)
            start = 0
        self._used = start + num_bytes
        return self._chunk[start : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)
