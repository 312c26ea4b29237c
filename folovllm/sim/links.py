"""What connects machines, and how long the operations of communication_plan.py take on it.

Milestone: M10. vLLM counterpart: none. Left out: trees, and switches that add up numbers on the way; several rings at
once; other traffic on the same link.

Row 1: no torch. A ring of n ranks sums a tensor in 2 * (n - 1) steps, and each step moves an n-th of it to the
neighbour:

    all-reduce  START + 2 * (n - 1) * (hop + bytes / n / bandwidth)
    all-gather  START +     (n - 1) * (hop + bytes / bandwidth)         `bytes` is the part of one rank
    send        START + hop + bytes / bandwidth

A step that decodes sends few bytes and pays START and the hops. A prompt of thousands of tokens pays the bytes.
"""

from dataclasses import dataclass

from folovllm.communication_plan import ALL_GATHER, ALL_REDUCE, SEND, ring_bytes

# Seconds that every operation takes, and seconds from one rank to the next (Link.hop): what NCCL itself expects of its
# low-latency ring when it chooses an algorithm.
NCCL = "https://github.com/NVIDIA/nccl/blob/5067397c2676d5aed50042fc39e5c8ee96eb0027/src/graph/tuning.cc"
START = 6.6e-6


@dataclass(frozen=True)
class Link:
    """The connection between one rank and the next. `bandwidth` counts one direction; data sheets add up both."""

    name: str
    bandwidth: float  # bytes/s
    hop: float  # seconds
    source: str  # of the bandwidth; `hop` is from NCCL


LINKS: dict[str, Link] = {
    "nvlink5": Link("NVLink 5", 900e9, 0.6e-6, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    "nvlink4": Link("NVLink 4", 450e9, 0.6e-6, "https://www.nvidia.com/en-us/data-center/h100/"),
    "nvlink3": Link("NVLink 3", 300e9, 0.6e-6, "https://www.nvidia.com/en-us/data-center/a100/"),
    "pcie5": Link("PCIe 5 x16", 64e9, 1.0e-6, "https://www.nvidia.com/en-us/data-center/h100/"),
    "pcie4": Link("PCIe 4 x16", 32e9, 1.0e-6, "https://www.nvidia.com/en-us/data-center/l4/"),
    "100gbe": Link("100 GbE", 12.5e9, 5.0e-6, "https://www.ieee802.org/3/ba/"),
}


def operation_seconds(link: Link, operation: str, num_ranks: int, num_calls: int, num_bytes: float) -> float:
    """How long `num_calls` of an operation take, which hand over `num_bytes` together.

    E.g. 161 all-reduces among 8 ranks on NVLink 4, of one token of 8,192 numbers each: 2.4 ms.
    """
    num_hops = {ALL_REDUCE: 2 * (num_ranks - 1), ALL_GATHER: num_ranks - 1, SEND: 1}[operation]
    return num_calls * (START + num_hops * link.hop) + ring_bytes(operation, num_bytes, num_ranks) / link.bandwidth
