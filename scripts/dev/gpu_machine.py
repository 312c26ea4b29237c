"""The GPU and what it can do: driver, versions, memory bandwidth, bf16 arithmetic, and the cost of one launch.

Milestone: M4. vLLM counterpart: vllm/collect_env.py. The first part of scripts/gpu_all.sh. The other parts hold their
figures against the two ceilings that are measured here, not against a data sheet: a copy that is many times as large as
the caches, counting bytes read and bytes written, and a large product of random bf16 matrices.

    python scripts/dev/gpu_machine.py [--device cuda|cpu] [--out DIR]
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
from gpu_result import FLUSH_SECONDS, Case, Clock, Options, Result, Row, parse_options

from folovllm.sim.hardware import Hardware

NVIDIA_SMI = ("--query-gpu=driver_version,pstate,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader")


@dataclass(frozen=True)
class Sizes:
    copy_bytes: int  # read, and as many written
    matrix: int  # rows of the square matrices
    transfer_bytes: int  # between host and device


SIZES = {"cuda": Sizes(2**32, 8192, 2**28), "cpu": Sizes(2**24, 256, 2**20)}


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy within the device."""
    source = torch.empty(SIZES[device].copy_bytes, dtype=torch.uint8, device=device).fill_(1)  # [copy_bytes]
    target = torch.empty_like(source)  # [copy_bytes]
    return 2 * source.nbytes / Clock(device, 1).time(lambda: target.copy_(source)).device


def matmul_rate(device: str) -> float:
    """FLOP per second of a product of random bf16 matrices."""
    n = SIZES[device].matrix
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))  # [n, n]
    out = torch.empty_like(a)  # [n, n]
    return 2.0 * n**3 / Clock(device, 1).time(lambda: torch.mm(a, b, out=out)).device


def measured_hardware(device: str) -> Hardware:
    """This machine as a row of folovllm/sim/hardware.py, with measured rates."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, float(properties.total_memory)
    else:
        name, memory = "CPU", 0.0
    return Hardware(name, matmul_rate(device), copy_bandwidth(device), memory, "measured in this run")


def make_clock(device: str, hardware: Hardware) -> Clock:
    """A clock whose flush lasts FLUSH_SECONDS and covers the second-level cache several times."""
    if device == "cpu":
        return Clock(device, 2**20, repeats=3)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Clock(device, max(int(hardware.bandwidth * FLUSH_SECONDS), 4 * cache))


def driver_facts() -> dict[str, str]:
    """What nvidia-smi says, word for word; nothing without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    answer = subprocess.run(["nvidia-smi", *NVIDIA_SMI], capture_output=True, text=True, timeout=60, check=False)
    names = NVIDIA_SMI[0].partition("=")[2].split(",")
    return dict(zip(names, map(str.strip, answer.stdout.split(",")), strict=False))


def gpu_facts(device: str) -> dict[str, object]:
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
        "shared_memory_per_block_optin": getattr(properties, "shared_memory_per_block_optin", None),
    }


def measure(name: str, value: float, unit: str) -> list[Row]:
    return [{"case": name, "value": round(value, 3), "unit": unit}]


def cases(options: Options) -> list[Case]:
    device, size = options.device, SIZES[options.device].transfer_bytes
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda")  # [transfer_bytes]
    on_device, one = torch.empty(size, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    clock = Clock(device, 1)

    def upload() -> list[Row]:
        return measure("host to device", size / clock.time(lambda: on_device.copy_(pinned, True)).device / 1e9, "GB/s")

    def download() -> list[Row]:
        return measure("device to host", size / clock.time(lambda: pinned.copy_(on_device, True)).device / 1e9, "GB/s")

    def launch() -> list[Row]:
        return measure("launch of one kernel", clock.time(lambda: one.add_(1)).launch * 1e6, "us")

    def round_trip() -> list[Row]:
        return measure("one number to the host", clock.time(lambda: one.add_(1).item()).launch * 1e6, "us")

    return [
        Case("copy bandwidth", lambda: measure("copy bandwidth", copy_bandwidth(device) / 1e9, "GB/s")),
        Case("bf16 product", lambda: measure("bf16 product", matmul_rate(device) / 1e12, "TFLOP/s")),
        Case("host to device", upload),
        Case("device to host", download),
        Case("launch of one kernel", launch),
        Case("one number to the host", round_trip),
    ]


def main() -> int:
    options = parse_options(__doc__ or "")
    facts = {"driver": driver_facts() if options.device == "cuda" else {}, "gpu": gpu_facts(options.device)}
    return Result("machine", "see each row", options, ("value", "unit"), **facts).run(cases(options))


if __name__ == "__main__":
    sys.exit(main())
