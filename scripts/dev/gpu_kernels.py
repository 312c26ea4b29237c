"""Time of each Triton kernel beside its floor, and beside what torch has for the same result.

Milestones: M4 (attention) and M7 (GPTQ). vLLM counterpart: benchmarks/kernels. Shapes and floors are those of
gpu_floor.py, with the ceilings that were measured on this machine (gpu_machine.py). All data is random, the caches are
cold before each call (gpu_result.Clock), and every result is compared with torch's before it is timed. The cache then
holds what the clock has written, and to write it back takes a part of the call's time: `of_floor` of a kernel that
needs a few microseconds is too low.

    ours_us, launch_us   medians: what the GPU computed, and what the host needed to launch it. `ours_us` has no time in
                         it for which the GPU waits for the host
    floor_us, of_floor   the measured floor, and which share of the time it explains; 1 would be perfect
    torch_us, x_torch    SDPA on K and V without pages, or F.linear with bf16 weights; above 1 we are faster
    first_s              the first call, which compiles the kernels

    python scripts/dev/gpu_kernels.py [--once] [--device cuda|cpu] [--out DIR]
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gpu_floor
import torch
import torch.nn.functional as F
from gpu_machine import ceilings, make_clock, measured_hardware
from gpu_result import Case, Clock, Options, Result, Row, parse_options

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.selector import get_attn_backend
from folovllm.model_executor.layers.quantization import triton_gptq
from folovllm.model_executor.layers.quantization.packing import Packing
from folovllm.model_shapes import shape_architecture
from folovllm.sim.hardware import Hardware
from folovllm.utils import cdiv

BLOCK_SIZE, BITS, GROUP_SIZE = 16, 4, 128
LARGEST_ERROR = 0.02  # |ours - torch's| / |torch's|, of all numbers together; bf16 loses about 0.005
SHOWN = ("ours_us", "launch_us", "floor_us", "of_floor", "x_torch", "first_s")
ATTENTION = ("decode", "prompt", "write")


@dataclass(frozen=True)
class Sizes:
    """Which cases of gpu_floor.cases are run, and in which dtype."""

    models: dict[str, tuple[str, ...]]  # model -> kinds of cases
    dtype: torch.dtype
    decodes: tuple[tuple[int, int], ...]  # (requests, tokens of each)
    prompts: tuple[int, ...]
    writes: tuple[int, ...]
    rows: tuple[int, ...]


SIZES = {
    "cuda": Sizes(
        {"qwen3-8b": (*ATTENTION, "gptq"), "qwen3-0.6b": ATTENTION[:2]},
        torch.bfloat16,
        decodes=((1, 1024), (32, 1024), (256, 1024), (1, 8192), (32, 8192), (256, 8192)),
        prompts=(1024, 8192),
        writes=(1, 256, 8192),
        rows=(1, 16, 64, 256),
    ),
    # Triton's interpreter multiplies in fp32 only.
    "cpu": Sizes({"tiny": (*ATTENTION, "gptq")}, torch.float32, ((1, 40), (3, 40)), (40,), (3,), (1, 3, 20)),
}


@dataclass(frozen=True)
class Contest:
    """Two calls for the same result. `with_tiles` returns our call with other tiles, where a kernel has a choice."""

    ours: Callable[[], torch.Tensor]
    torchs: Callable[[], torch.Tensor]
    with_tiles: Callable[[Any], Callable[[], torch.Tensor]] | None = None


def attention_contest(case: gpu_floor.Case, dtype: torch.dtype, device: str) -> Contest:
    """One layer's attention over K and V in pages in random order, against SDPA on the same K and V without pages."""
    arch, num_reqs, (computed, new) = shape_architecture(case.model), len(case.requests), case.requests[0]
    seq_len = computed + new
    spec = AttentionSpec.from_arch(arch, dtype, torch.device(device), BLOCK_SIZE)
    backend: Any = get_attn_backend("triton_paged", spec)
    metadata = metadata_of(num_reqs, computed, new, device)
    table = metadata.block_table.long()  # [num_reqs, blocks_each]
    cache = torch.randn(backend.kv_cache_shape(1 + table.numel()), dtype=dtype, device=device)
    query = torch.randn(num_reqs * new, arch.num_attention_heads, arch.head_dim, dtype=dtype, device=device)
    key, value = (
        pages[table].flatten(1, 2)[:, :seq_len].transpose(1, 2).contiguous() for pages in cache
    )  # [num_reqs, num_kv_heads, seq_len, head_size]
    rows = query.view(num_reqs, new, *query.shape[1:]).transpose(1, 2)  # [num_reqs, num_heads, new, head_size]

    def sdpa() -> torch.Tensor:
        out = F.scaled_dot_product_attention(rows, key, value, is_causal=new > 1, enable_gqa=True)
        return out.transpose(1, 2).reshape(query.shape)

    def with_tiles(tiles: Any) -> Callable[[], torch.Tensor]:
        backend_with, step = type(backend)(spec, tiles), replace(metadata)
        backend_with.prepare(step)
        return lambda: backend_with.forward(query, cache, step)

    return Contest(with_tiles(backend.tiles), sdpa, with_tiles)


def metadata_of(num_reqs: int, computed: int, new: int, device: str) -> AttentionMetadata:
    """A step of requests that have `computed` tokens in the cache and `new` ones in this step."""
    blocks_each, seq_len = cdiv(computed + new, BLOCK_SIZE), computed + new
    table = 1 + torch.randperm(num_reqs * blocks_each).view(num_reqs, blocks_each)  # [num_reqs, blocks_each]
    positions = torch.arange(computed, seq_len)  # [new]
    slots = table[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE  # [num_reqs, new]
    return AttentionMetadata(
        query_start_loc=list(range(0, num_reqs * new + 1, new)),
        seq_lens=[seq_len] * num_reqs,
        block_table=table.int().to(device),
        slot_mapping=slots.flatten().to(device),
        block_size=BLOCK_SIZE,
    )


def write_contest(case: gpu_floor.Case, dtype: torch.dtype, device: str) -> Contest:
    """K and V of new tokens into slots in random order, against torch's index_copy_."""
    arch, (_, new) = shape_architecture(case.model), case.requests[0]
    backend = get_attn_backend("triton_paged", AttentionSpec.from_arch(arch, dtype, torch.device(device), BLOCK_SIZE))
    metadata = metadata_of(1, 0, new, device)
    shape = (new, arch.num_key_value_heads, arch.head_dim)
    key, value = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))  # [new, num_kv_heads, head_size]
    caches = [
        torch.zeros(backend.kv_cache_shape(1 + metadata.block_table.numel()), dtype=dtype, device=device)
        for _ in range(2)
    ]

    def ours() -> torch.Tensor:
        backend.write(key, value, caches[0], metadata)
        return caches[0]

    def torchs() -> torch.Tensor:
        for pages, rows in zip(caches[1], (key, value), strict=True):
            pages.view(-1, *shape[1:]).index_copy_(0, metadata.slot_mapping, rows)
        return caches[1]

    return Contest(ours, torchs)


def gptq_contest(case: gpu_floor.Case, dtype: torch.dtype, device: str) -> Contest:
    """Random packed weights of 4 bits, against the same weights in plain bf16."""
    inputs, outputs = case.inputs, case.outputs
    group = min(GROUP_SIZE, inputs)
    num_groups = inputs // group
    weight = triton_gptq.TritonWeight(
        words=torch.randint(-(2**31), 2**31, (inputs * BITS // 32, outputs), device=device).int(),
        scales=(torch.rand(num_groups, outputs, device=device) / inputs**0.5).half(),
        zeros=torch.full((num_groups, outputs), 8, dtype=torch.uint8, device=device),
        order=None,
        bits=BITS,
        group_size=group,
    )
    levels = Packing(BITS).unpack_rows(weight.words)  # [inputs, outputs]
    zeros, scales = (t.float().repeat_interleave(group, 0) for t in (weight.zeros, weight.scales))  # [inputs, outputs]
    plain = ((levels.float() - zeros) * scales).t().to(dtype).contiguous()  # [outputs, inputs]
    x = torch.randn(case.rows, inputs, dtype=dtype, device=device)  # [rows, inputs]
    num_programs = triton_gptq.PROGRAMS_PER_PROCESSOR * processors(device)

    def with_tiles(tiles: Any) -> Callable[[], torch.Tensor]:
        return lambda: triton_gptq.multiply(x, weight, None, num_programs, tiles)

    return Contest(with_tiles(None), lambda: F.linear(x, plain), with_tiles)


def processors(device: str) -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 2


CONTESTS = {
    "decode": attention_contest,
    "prompt": attention_contest,
    "write": write_contest,
    "gptq": gptq_contest,
}


def error_of(ours: torch.Tensor, torchs: torch.Tensor) -> float:
    """How far the two results are apart, relative to torch's. Raises AssertionError if that is too far."""
    ours, torchs = ours.float(), torchs.float()
    error = float((ours - torchs).norm() / torchs.norm())
    if not error <= LARGEST_ERROR:  # nor is it NaN
        raise AssertionError(f"the result is off by {error:.2g} of its size")
    return error


@torch.inference_mode()
def measure(case: gpu_floor.Case, dtype: torch.dtype, device: str, hardware: Hardware, clock: Clock) -> list[Row]:
    contest = CONTESTS[case.kind](case, dtype, device)
    start = time.perf_counter()
    error = error_of(contest.ours(), contest.torchs())
    first = time.perf_counter() - start
    ours, torchs, floor = clock.time(contest.ours), clock.time(contest.torchs), case.cost.floor(hardware)
    return [
        {
            "case": name_of(case),
            "ours_us": round(1e6 * ours.device, 2),
            "launch_us": round(1e6 * ours.launch, 2),
            "floor_us": round(1e6 * floor, 2),
            "of_floor": round(floor / ours.device, 3),
            "bound": case.cost.least.bound(hardware),
            "torch_us": round(1e6 * torchs.device, 2),
            "x_torch": round(torchs.device / ours.device, 3),
            "error": f"{error:.1e}",
            "first_s": round(first, 2),
        }
    ]


def name_of(case: gpu_floor.Case) -> str:
    return f"{case.model} {case.name}"


def cases(sizes: Sizes, device: str, hardware: Hardware, clock: Clock) -> list[Case]:
    found = [
        case
        for model, kinds in sizes.models.items()
        for case in gpu_floor.cases(model, processors(device), sizes.decodes, sizes.prompts, sizes.writes, sizes.rows)
        if case.kind in kinds
    ]
    return [Case(name_of(case), partial(measure, case, sizes.dtype, device, hardware, clock), 1.0) for case in found]


def once(options: Options) -> tuple[Sizes, Hardware, Clock]:
    """Small cases, each called a few times: for a sanitizer, under which everything takes far longer."""
    dtype = SIZES[options.device].dtype
    return replace(SIZES["cpu"], dtype=dtype), Hardware("not measured", 1.0, 1.0, 0.0, ""), Clock(options.device, 1, 1)


def main() -> int:
    options = parse_options(__doc__ or "", "--once", "small cases, called a few times and not timed, for a sanitizer")
    if options.flag:
        sizes, hardware, clock = once(options)
    else:
        hardware = measured_hardware(options)
        sizes, clock = SIZES[options.device], make_clock(options.device, hardware)
    result = Result("kernels", "us", options, SHOWN, ceilings=ceilings(hardware), dtype=str(sizes.dtype))
    return result.run(cases(sizes, options.device, hardware, clock))


if __name__ == "__main__":
    sys.exit(main())
