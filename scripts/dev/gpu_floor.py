#!/usr/bin/env python3
"""Prints how fast our GPU kernels could be at best: bytes, operations and the data-sheet floor per kernel and GPU.

Milestones: M4 and M7. vLLM counterpart: none. Needs no GPU, but Triton, as the kernels' modules import it. The
arithmetic is in folovllm/sim/kernel_cost.py, which says what a floor leaves out.

    python scripts/dev/gpu_floor.py [--model qwen3-0.6b,qwen3-8b] [--gpu h200,l4] [--kind decode,step] [--json FILE]

The first table has the data sheets' figures of the GPUs. `flop/byte`: what a GPU can compute while it reads a byte. An
operation with fewer is bound by memory.

The first table of a model has one line per case:

    bytes, flop    the least that any kernel for this result must move and compute
    moves          bytes that the loads and stores of our kernels name, as a multiple of `bytes`. The L2 cache serves a
                   part of what is above 1, so this is an upper limit of the traffic
    computes       operations of our kernels' products, padding included, as a multiple of `flop`
    bound by       what the floor is made of
    the GPUs       the floor in microseconds: the larger of bytes / bandwidth and flop / peak, from data sheets

The second table (`--kind step`) is about a decode step of the whole model:

    memory         all weights, and K and V of the batch. "does not fit": more than an engine takes of the GPU's memory
    launches       kernels and copies that the host launches in a step
    host           an estimate of how long that takes the host. A step takes at least this and at least the floor. CUDA
                   graphs would remove it; FoloVLLM has none
    the GPUs       the floor in milliseconds, and the tokens per second that no engine can exceed

Rows "GPTQ" have linear layers of 4 bits in groups of 128. If a layer has fewer tiles than the GPU can run at once, its
inputs are cut into parts, whose sums in fp32 are written and read again. So `moves` may be larger for 64 rows than for
256.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends import triton_paged
from folovllm.benchmarks.report import write_json
from folovllm.config import CacheConfig
from folovllm.hf_config import ModelArchitecture
from folovllm.model_executor.layers.quantization import triton_gptq
from folovllm.model_shapes import SHAPES, shape_architecture
from folovllm.sim.hardware import HARDWARE, Hardware
from folovllm.sim.kernel_cost import (
    LAUNCH_SECONDS,
    AttentionShape,
    GPTQShape,
    Operation,
    Work,
    attention_operation,
    gptq_bytes_per_weight,
    gptq_operation,
    linear_sizes,
    step_launches,
    step_work,
    weight_bytes,
    write_operation,
)
from folovllm.utils import cdiv, unknown_name_message

GPUS = ("h200", "h100", "a100", "l4", "rtx4090", "b200")
STEP = "step"  # the second table
KINDS = ("decode", "prompt", "write", "gptq", STEP)
DECODES = ((1, 1024), (32, 1024), (256, 1024))  # (requests, tokens of each in the end)
PROMPTS = (1024, 8192)
WRITES = (1, 256, 8192)
ROWS = (1, 16, 64, 256)
BATCHES = (1, 32, 256)
CONTEXT = 1024
GROUP_SIZE = 128
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One operation of one layer of a model."""

    model: str
    kind: str  # one of KINDS, but STEP
    name: str
    cost: Operation
    requests: tuple[tuple[int, int], ...] = ()  # (computed, new) of each; () for a linear layer
    linear: str = ""  # of a linear layer: a name of linear_sizes
    rows: int = 0
    inputs: int = 0
    outputs: int = 0


def cases(
    model: str,
    processors: int = HARDWARE[GPUS[0]].processors,
    decodes: Sequence[tuple[int, int]] = DECODES,
    prompts: Sequence[int] = PROMPTS,
    writes: Sequence[int] = WRITES,
    rows: Sequence[int] = ROWS,
) -> list[Case]:
    """Returns the cases of a shape of folovllm/model_shapes.py, in bf16.

    `processors` is the GPU's number of streaming multiprocessors. The GPTQ kernels cut their work by it, so it changes
    what they do, but no floor.
    """
    arch = shape_architecture(model)
    return [
        *_attention_cases(model, arch, decodes, prompts),
        *_write_cases(model, arch, writes),
        *_gptq_cases(model, arch, rows, _programs(processors)),
    ]


def attention_shape(arch: ModelArchitecture) -> AttentionShape:
    return AttentionShape(arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim, DTYPE.itemsize)


def attention_cost(arch: ModelArchitecture, requests: Sequence[tuple[int, int]]) -> Operation:
    """Attention of one layer, with the tiles that the backend chooses on a GPU."""
    shape = attention_shape(arch)
    spec = AttentionSpec(shape.num_heads, shape.num_kv_heads, shape.head_size, DTYPE, torch.device("cuda"), 16)
    return attention_operation(shape, requests, triton_paged.tile_sizes(spec))


def gptq_cost(shape: GPTQShape, rows: int, num_programs: int) -> Operation:
    """`triton_gptq.multiply`, with the tiles and parts that it chooses."""
    tiles = triton_gptq.tile_sizes(rows, shape.group_size, DTYPE)
    num_blocks = cdiv(shape.outputs, tiles.outputs) * cdiv(rows, tiles.rows)
    part_size = triton_gptq.inputs_per_part(num_blocks, shape.inputs, tiles.inputs, num_programs)
    return gptq_operation(shape, rows, tiles, part_size)


def _attention_cases(
    model: str, arch: ModelArchitecture, decodes: Sequence[tuple[int, int]], prompts: Sequence[int]
) -> Iterator[Case]:
    for count, length in decodes:
        requests = ((length - 1, 1),) * count
        yield Case(model, "decode", f"decode {count} x {length:,}", attention_cost(arch, requests), requests)
    for length in prompts:
        requests = ((0, length),)
        yield Case(model, "prompt", f"prompt of {length:,}", attention_cost(arch, requests), requests)


def _write_cases(model: str, arch: ModelArchitecture, writes: Sequence[int]) -> Iterator[Case]:
    for count in writes:
        cost = write_operation(attention_shape(arch), count)
        yield Case(model, "write", f"write {count:,}", cost, ((0, count),))


def _gptq_cases(model: str, arch: ModelArchitecture, rows: Sequence[int], num_programs: int) -> Iterator[Case]:
    for linear, (inputs, outputs) in linear_sizes(arch).items():
        for count in rows:
            cost = gptq_cost(GPTQShape(inputs, outputs, group_size=min(GROUP_SIZE, inputs)), count, num_programs)
            name = f"GPTQ {linear} {count}"
            yield Case(model, "gptq", name, cost, linear=linear, rows=count, inputs=inputs, outputs=outputs)


@dataclass(frozen=True)
class Step:
    """A decode step of the whole model, in which every request has CONTEXT tokens."""

    weights: str  # "bf16" or "GPTQ"
    batch: int
    least: Work
    memory: float  # bytes of all weights, and of K and V
    launches: int

    @property
    def name(self) -> str:
        return f"{self.weights}, batch {self.batch}"

    def fits(self, hardware: Hardware) -> bool:
        """Whether the memory suffices that an engine takes by default. Activations come on top."""
        return self.memory <= CacheConfig.gpu_memory_utilization * hardware.memory


def steps(model: str, processors: int = HARDWARE[GPUS[0]].processors, batches: Sequence[int] = BATCHES) -> list[Step]:
    """Returns the steps with each kind of weights, for each batch. `processors`: as of `cases`."""
    arch = shape_architecture(model)
    kv_bytes = CONTEXT * arch.kv_bytes_per_token(DTYPE.itemsize)
    found = []
    for batch in batches:
        requests, linears = [(CONTEXT - 1, 1)] * batch, _gptq_cases(model, arch, (batch,), _programs(processors))
        more = sum(len(case.cost.kernels) - 1 for case in linears)  # F.linear is one kernel
        for name, width, launches in (
            ("bf16", float(DTYPE.itemsize), step_launches(arch)),
            ("GPTQ", gptq_bytes_per_weight(group_size=GROUP_SIZE), step_launches(arch, more)),
        ):
            memory = weight_bytes(arch, width, DTYPE.itemsize) + batch * kv_bytes
            found.append(Step(name, batch, step_work(arch, requests, width), memory, launches))
    return found


def _programs(processors: int) -> int:
    return triton_gptq.PROGRAMS_PER_PROCESSOR * processors


# --- printing ---------------------------------------------------------------------------------------------------------


def case_row(case: Case, gpus: dict[str, Hardware]) -> dict[str, str]:
    does, least = case.cost.does, case.cost.least
    return {
        "case": case.name,
        "bytes": scaled(least.bytes),
        "flop": scaled(least.flops),
        "flop/byte": f"{least.flops / least.bytes:.1f}",
        "moves": f"{does.bytes / least.bytes:.2f} x",
        "computes": f"{does.flops / least.flops:.2f} x" if least.flops else "-",
        "bound by": bound_by(least, gpus),
    } | {name: f"{1e6 * case.cost.floor(gpu):,.2f}" for name, gpu in gpus.items()}


def step_row(step: Step, gpus: dict[str, Hardware]) -> dict[str, str]:
    host = "-".join(f"{1e3 * step.launches * seconds:.1f}" for seconds in LAUNCH_SECONDS)
    return {
        "step": step.name,
        "bytes": scaled(step.least.bytes),
        "flop": scaled(step.least.flops),
        "memory": f"{step.memory / 1e9:.1f} GB",
        "launches": str(step.launches),
        "host": f"{host} ms",
        "bound by": bound_by(step.least, gpus),
    } | {name: floor_cell(step, gpu) for name, gpu in gpus.items()}


def floor_cell(step: Step, gpu: Hardware) -> str:
    """E.g. "1.30 ms, 770/s"."""
    if not step.fits(gpu):
        return "does not fit"
    seconds = step.least.seconds(gpu)
    return f"{1e3 * seconds:.2f} ms, {step.batch / seconds:,.0f}/s"


def gpu_row(name: str, gpu: Hardware) -> dict[str, str]:
    return {
        "GPU": name,
        "bandwidth": f"{gpu.gb_per_s:,.0f} GB/s",
        "bf16": f"{gpu.tflops:,.0f} TFLOP/s",
        "flop/byte": f"{gpu.knee:.0f}",
        "memory": f"{gpu.gb:.0f} GB",
        "multiprocessors": str(gpu.processors),
    }


def bound_by(work: Work, gpus: dict[str, Hardware]) -> str:
    """E.g. "memory", or "compute, not on l4" if that GPU alone waits for its memory."""
    bounds = {name: work.bound(gpu) for name, gpu in gpus.items()}
    usual = max(sorted(set(bounds.values())), key=list(bounds.values()).count)
    others = ", ".join(name for name, bound in bounds.items() if bound != usual)
    return f"{usual}, not on {others}" if others else usual


def scaled(number: float) -> str:
    """Three digits and a power of ten. E.g. 8_388_608 -> "8.39 M"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:#.3g}".removesuffix(".") + f" {prefix}"
    return f"{number:.0f}"


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """The first column is aligned to the left, the others to the right."""
    columns = [[name, *(row[name] for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join((line[0].ljust(widths[0]), *cells)))
    print()


def as_json(models: Sequence[str], kinds: Sequence[str], gpus: dict[str, Hardware]) -> list[dict[str, Any]]:
    """One row per GPU, model and case. Seconds, bytes and operations are not rounded."""
    rows: list[dict[str, Any]] = []
    for gpu, hardware in gpus.items():
        for model in models:
            start = {"model": model, "gpu": gpu}
            for case in (c for c in cases(model, hardware.processors) if c.kind in kinds):
                does = case.cost.does
                row = start | {"kind": case.kind, "case": case.name} | floor_figures(case.cost.least, hardware)
                rows.append(row | {"bytes_named": does.bytes, "flops_computed": does.flops})
            for step in steps(model, hardware.processors) if STEP in kinds else ():
                fits, figures = step.fits(hardware), floor_figures(step.least, hardware)
                rows.append(
                    start
                    | {"kind": STEP, "case": step.name}
                    | figures
                    | {"memory_bytes": step.memory, "fits": fits, "launches": step.launches}
                    | {"host_s": [step.launches * seconds for seconds in LAUNCH_SECONDS]}
                    | {"tok_per_s": step.batch / figures["floor_s"] if fits else None}
                )
    return rows


def floor_figures(least: Work, hardware: Hardware) -> dict[str, Any]:
    figures = {"bytes": least.bytes, "flops": least.flops, "bound": least.bound(hardware)}
    return figures | {"floor_s": least.seconds(hardware)}


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(unknown_name_message(what, name, list(known)))
    return names


def main() -> None:
    known = [name for name in HARDWARE if HARDWARE[name].processors]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b,qwen3-8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--gpu", default=",".join(GPUS), help=f"of {', '.join(known)} (default: %(default)s)")
    parser.add_argument("--kind", default=",".join(KINDS), help="cases to show (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    args = parser.parse_args()
    models = chosen(args.model, list(SHAPES), "model")
    kinds = chosen(args.kind, KINDS, "kind of case")
    gpus = {name: HARDWARE[name] for name in chosen(args.gpu, known, "GPU")}
    first = next(iter(gpus))
    print("GPUs, from their data sheets")
    print_table([gpu_row(*item) for item in gpus.items()])
    for model in models:
        if rows := [case_row(case, gpus) for case in cases(model, gpus[first].processors) if case.kind in kinds]:
            print(f"{model}: one layer in bf16, floors in microseconds; `moves` and `computes` on {first}")
            print_table(rows)
        if STEP in kinds:
            print(f"{model}: a decode step of the whole model, {CONTEXT:,} tokens of context; `launches` on {first}")
            print_table([step_row(step, gpus) for step in steps(model, gpus[first].processors)])
    if args.json:
        command = " ".join(["scripts/dev/gpu_floor.py", *sys.argv[1:]])
        write_json({"command": command, "results": as_json(models, kinds, gpus)}, args.json)


if __name__ == "__main__":
    main()
