"""The GPU and what it can do: driver, versions, memory bandwidth, bf16 arithmetic, and the cost of one launch.

Milestone: M4. vLLM counterpart: vllm/collect_env.py. The first part of scripts/gpu_all.sh. The floors in the other
parts' files hold for the ceilings that are measured here, not for those of a data sheet:

- bandwidth: of a copy, counting bytes read and bytes written, or of a sum, which only reads, whichever is more. Both
  are many times as large as the caches.
- arithmetic: a large product of random bf16 matrices.

gpu_all.py moves this part's result into summary.json, where the other parts read both. If they are missing or from
another GPU, a part measures them anew.

    python scripts/dev/gpu_machine.py [--device cuda|cpu] [--out DIR]
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from gpu_result import FLUSH_SECONDS, Case, Clock, Options, Result, Row, nvidia_smi, parse_options

from folovllm.benchmarks.machine import describe_device
from folovllm.sim.hardware import Hardware

DRIVER_FACTS = ("driver_version", "pstate", "clocks.max.sm", "clocks.max.mem", "power.limit")

COPY, READ, PRODUCT = "copy bandwidth", "read bandwidth", "bf16 product"  # the cases that give the ceilings
UP, DOWN = "host to device", "device to host"
LAUNCH, ROUND_TRIP = "launch of one kernel", "one number to the host"


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


def read_bandwidth(device: str) -> float:
    """Bytes read per second by a sum within the device. Decode steps read nearly all of their bytes."""
    source = torch.ones(SIZES[device].copy_bytes // 4, device=device)  # [copy_bytes / 4]
    return source.nbytes / Clock(device, 1).time(lambda: source.sum()).device


def matmul_rate(device: str) -> float:
    """FLOP per second of a product of random bf16 matrices."""
    n = SIZES[device].matrix
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))  # [n, n]
    out = torch.empty_like(a)  # [n, n]
    return 2.0 * n**3 / Clock(device, 1).time(lambda: torch.mm(a, b, out=out)).device


def measured_hardware(options: Options) -> Hardware:
    """This machine as a row of folovllm/sim/hardware.py, with measured rates. `source` says where they come from."""
    device = options.device
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, float(properties.total_memory)
    else:
        name, memory = "CPU", 0.0
    if rates := saved_rates(options):
        bandwidth = 1e9 * max(rates[COPY], rates[READ])
        return Hardware(name, rates[PRODUCT] * 1e12, bandwidth, memory, "summary.json")
    bandwidth = max(copy_bandwidth(device), read_bandwidth(device))
    return Hardware(name, matmul_rate(device), bandwidth, memory, "measured by this part")


def saved_rates(options: Options) -> dict[str, float]:
    """The ceilings in summary.json, by case; nothing if this part has not measured all of them on this device."""
    file = options.out / "summary.json"
    content = json.loads(file.read_text(encoding="utf-8")).get("part_machine") if file.exists() else None
    if not content:
        return {}
    same_device = all(content["machine"].get(key) == value for key, value in describe_device(options.device).items())
    rates = {row["case"]: row["value"] for row in content["results"]}
    return rates if same_device and {COPY, READ, PRODUCT} <= rates.keys() else {}


def ceilings(hardware: Hardware) -> dict[str, Any]:
    """For a result file: what its floors are computed from."""
    rates = {"bytes_per_second": hardware.bandwidth, "flops_per_second": hardware.flops}
    return rates | {"source": hardware.source}


def make_clock(device: str, hardware: Hardware) -> Clock:
    """A clock whose flush lasts FLUSH_SECONDS and covers the second-level cache several times."""
    if device == "cpu":
        return Clock(device, 2**20, repeats=3)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Clock(device, max(int(hardware.bandwidth * FLUSH_SECONDS), 4 * cache))


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


def transfer_rate(device: str, upload: bool) -> float:
    """Bytes per second between pinned memory of the host and the device."""
    size = SIZES[device].transfer_bytes
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device == "cuda")  # [transfer_bytes]
    on_device = torch.empty(size, dtype=torch.uint8, device=device)  # [transfer_bytes]
    source, target = (pinned, on_device) if upload else (on_device, pinned)
    return size / Clock(device, 1).time(lambda: target.copy_(source, non_blocking=True)).device


def launch_seconds(device: str) -> float:
    """The host's time to launch one kernel."""
    one = torch.zeros(1, device=device)  # [1]
    return Clock(device, 1).time(lambda: one.add_(1)).launch


def round_trip_seconds(device: str) -> float:
    """From the launch of a kernel until the host knows its result."""
    one = torch.zeros(1, device=device)  # [1]
    return Clock(device, 1).time(lambda: one.add_(1).item()).launch


def cases(options: Options) -> list[Case]:
    """Each one allocates its own tensors, so that too little memory ends that case alone."""
    device = options.device
    return [
        Case(COPY, lambda: measure(COPY, copy_bandwidth(device) / 1e9, "GB/s")),
        Case(READ, lambda: measure(READ, read_bandwidth(device) / 1e9, "GB/s")),
        Case(PRODUCT, lambda: measure(PRODUCT, matmul_rate(device) / 1e12, "TFLOP/s")),
        Case(UP, lambda: measure(UP, transfer_rate(device, upload=True) / 1e9, "GB/s")),
        Case(DOWN, lambda: measure(DOWN, transfer_rate(device, upload=False) / 1e9, "GB/s")),
        Case(LAUNCH, lambda: measure(LAUNCH, launch_seconds(device) * 1e6, "us")),
        Case(ROUND_TRIP, lambda: measure(ROUND_TRIP, round_trip_seconds(device) * 1e6, "us")),
    ]


def main() -> int:
    options = parse_options(__doc__ or "")
    driver = nvidia_smi(*DRIVER_FACTS) if options.device == "cuda" else []
    facts: dict[str, Any] = {"driver": driver[0] if driver else {}, "gpu": gpu_facts(options.device)}
    return Result("machine", "see each row", options, ("value", "unit"), **facts).run(cases(options))


if __name__ == "__main__":
    sys.exit(main())
