"""Peak rates of known machines: the one table that the number drills and the simulator read.

Milestone: M4 (the roofline). vLLM counterpart: none. Left out: rates of other data types, sparsity.
What connects machines is in links.py.

Row 1: no torch. Figures are those of the data sheets, dense, in bf16 with fp32 accumulation. Where a sheet states the
rate with sparsity, half of it is the dense one. A data sheet counts in powers of ten: 1 GB = 10^9 bytes. No kernel
reaches a peak; a good one reaches 70 to 90 % of it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One machine. Its memory is all there is: weights, activations and the KV cache share it."""

    name: str
    flops: float  # FLOP/s, dense bf16
    bandwidth: float  # bytes/s, reads of the memory that holds the weights
    memory: float  # bytes
    source: str
    link: str = "pcie4"  # name in sim/links.py: what connects it with another of its kind
    processors: int = 0  # streaming multiprocessors of a GPU

    @property
    def knee(self) -> float:
        """FLOP per byte at which arithmetic and memory take equally long. Below it, memory is the limit."""
        return self.flops / self.bandwidth

    @property
    def tflops(self) -> float:
        return self.flops / 1e12

    @property
    def gb_per_s(self) -> float:
        return self.bandwidth / 1e9

    @property
    def gb(self) -> float:
        return self.memory / 1e9


HARDWARE: dict[str, Hardware] = {
    # A DGX B200 has eight: 1,440 GB, 64 TB/s, and 72 PFLOP/s in FP8 with sparsity, which is 4 times dense bf16.
    "b200": Hardware(
        "B200", 2250e12, 8e12, 180e9, "https://www.nvidia.com/en-us/data-center/dgx-b200/", "nvlink5", 148
    ),
    "h100": Hardware(
        "H100 SXM", 989e12, 3.35e12, 80e9, "https://www.nvidia.com/en-us/data-center/h100/", "nvlink4", 132
    ),
    "h200": Hardware(
        "H200 SXM", 989e12, 4.8e12, 141e9, "https://www.nvidia.com/en-us/data-center/h200/", "nvlink4", 132
    ),
    "a100": Hardware(
        "A100 SXM 80GB", 312e12, 2.039e12, 80e9, "https://www.nvidia.com/en-us/data-center/a100/", "nvlink3", 108
    ),
    "l4": Hardware("L4", 121e12, 300e9, 24e9, "https://www.nvidia.com/en-us/data-center/l4/", processors=58),
    "rtx4090": Hardware(
        "RTX 4090", 165e12, 1.008e12, 24e9, "NVIDIA Ada GPU architecture whitepaper, appendix A", processors=128
    ),
    # Measured, not promised: a test compares the row with that file.
    "cpu": Hardware(
        "the reference CPU (2 cores)", 445e9, 34.6e9, 25.3e9, "milestones/m4/results/roofline_cpu.json", "100gbe"
    ),
}
