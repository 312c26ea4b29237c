"""How fast this machine reads memory: the floor under every decode step.

Milestone: M1. vLLM counterpart: none. Measured in the same run as the arms, with as many threads.
"""

import time
from typing import Any

import torch

from folovllm.model_executor.huge_pages import huge_zeros

NUM_READS = 7
HOW = "best of {n} sums over one float32 tensor of {size:.2f} GiB in {pages} with {threads} threads"


class MemoryReader:
    """Sums a tensor far larger than the caches: each element is read once, nothing is written, and what the caches held
    before is gone."""

    def __init__(self, device: str, num_bytes: int) -> None:
        self._data = _ones(max(num_bytes // 4, 1), device)  # [num_elements]
        self.num_bytes = self._data.numel() * self._data.element_size()

    def read(self) -> float:
        """Bytes per second of one read."""
        return self.num_bytes / _time_one_read(self._data)


def measure_bandwidth(device: str, num_bytes: int) -> dict[str, Any]:
    """Bytes per second: the best of several reads, since whatever disturbs a read makes it slower and never faster."""
    reader = MemoryReader(device, num_bytes)
    pages = "huge pages" if device == "cpu" else "device memory"
    how = HOW.format(n=NUM_READS, size=reader.num_bytes / 2**30, pages=pages, threads=torch.get_num_threads())
    return {"bytes_per_second": max(reader.read() for _ in range(NUM_READS)), "how": how}


def _ones(num_elements: int, device: str) -> torch.Tensor:
    """On a CPU in huge pages, as our weights are: in ordinary ones the machine reads less, which would flatter us."""
    if device == "cpu":
        return huge_zeros((num_elements,), torch.float32).fill_(1.0)
    return torch.ones(num_elements, dtype=torch.float32, device=device)


def _time_one_read(data: torch.Tensor) -> float:
    start = time.perf_counter()
    data.sum().item()  # item() also waits for a GPU
    return time.perf_counter() - start


def describe_device(device: str) -> dict[str, Any]:
    """What torch knows of the processor: name and memory of the GPU, or the CPU's vector instructions."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    flags = torch.cpu.get_capabilities()
    return {"cpu_capabilities": sorted(name for name, value in flags.items() if value is True)}
