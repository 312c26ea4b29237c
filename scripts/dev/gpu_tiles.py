"""Time of each Triton kernel with other sizes of its tiles, beside the sizes that the engine takes.

Milestones: M4 (attention) and M7 (GPTQ). vLLM counterpart: benchmarks/kernels/benchmark_moe.py, which searches hundreds
of sizes and writes a table that the engine reads. Left out: the search and the table. A short list is tried, and the
engine takes what `tile_sizes` says. Cases, data and clock are those of gpu_kernels.py. Each candidate computes the
whole operation, with `merge_kernel` if there are parts, and its result is compared with torch's before it is timed.

    results    one row per candidate: `us` (median), `of_floor` (the share of the time that the floor explains),
               `default` (whether the engine takes it), or `refused`: why it cannot run on this GPU
    choices    per case: the default and the fastest candidate. `gain` is the time of the first over that of the second;
               1 means that the default is the fastest

    python scripts/dev/gpu_tiles.py [--device cuda|cpu] [--out DIR]
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import gpu_floor
import torch
from gpu_kernels import BLOCK_SIZE, CONTESTS, GROUP_SIZE, SIZES, Contest, error_of, name_of, processors
from gpu_machine import ceilings, make_clock, measured_hardware
from gpu_result import Case, Clock, Result, Row, first_line, parse_options
from triton.runtime.errors import TritonError

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends import triton_paged
from folovllm.attention.backends.triton_paged import Tile
from folovllm.model_executor.layers.quantization import triton_gptq
from folovllm.model_shapes import shape_architecture
from folovllm.sim.hardware import Hardware

# --- what is tried beside the default ---------------------------------------------------------------------------------

CHUNKS = (  # of chunk_kernel: (new token, head) pairs, keys, warps, stages
    (64, 64, 4, 3), (64, 32, 4, 5), (128, 32, 8, 3), (128, 64, 8, 3), (128, 32, 8, 5), (128, 64, 8, 5),
    (128, 128, 8, 3),
)  # fmt: skip
SINGLES = (  # of single_kernel: keys of a part; keys of a tile, warps, stages
    (128, 32, 4, 3), (512, 32, 4, 3), (1024, 32, 4, 3), (256, 64, 4, 3), (512, 64, 4, 3), (128, 64, 4, 3),
    (256, 32, 4, 5), (256, 64, 4, 5), (256, 32, 2, 3), (256, 64, 8, 3),
)  # fmt: skip
GEMVS = (  # of gemv_kernel: outputs, inputs, warps, stages
    (64, 128, 2, 3), (128, 128, 4, 3), (32, 128, 2, 3), (32, 128, 4, 3), (64, 64, 2, 3), (64, 128, 4, 4),
    (128, 64, 4, 3),
)  # fmt: skip
FEW_ROWS = (  # of tile_kernel for up to 16 rows of x: rows, outputs, inputs, warps, stages
    (16, 64, 64, 2, 3), (16, 64, 64, 4, 4), (16, 128, 64, 4, 3), (16, 64, 128, 4, 3), (16, 32, 128, 4, 3),
    (16, 128, 64, 8, 3),
)  # fmt: skip
MANY_ROWS = (
    (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (128, 128, 64, 8, 3), (64, 256, 64, 8, 3), (32, 128, 64, 4, 3),
    (64, 128, 32, 8, 3), (128, 128, 32, 8, 3), (64, 128, 64, 8, 4),
)  # fmt: skip


def chunk_candidates(default: triton_paged.Tiles) -> list[triton_paged.Tiles]:
    return [default, *(replace(default, chunk=Tile(*sizes)) for sizes in CHUNKS)]


def single_candidates(default: triton_paged.Tiles) -> list[triton_paged.Tiles]:
    rows = default.single.rows
    return [default, *(replace(default, split_kv=split, single=Tile(rows, *sizes)) for split, *sizes in SINGLES)]


def gptq_candidates(rows: int, group_size: int, dtype: torch.dtype) -> list[triton_gptq.Tiles]:
    """Tiles for `rows` rows of x. A tile of inputs ends where a group does."""
    if rows == 1:
        lists = [triton_gptq.Tiles(1, *sizes) for sizes in GEMVS]
    else:
        lists = [triton_gptq.Tiles(*sizes) for sizes in (FEW_ROWS if rows <= 16 else MANY_ROWS)]
    largest = group_size & -group_size
    found = [triton_gptq.tile_sizes(rows, group_size, dtype)]
    return [*found, *(replace(tiles, inputs=min(tiles.inputs, largest)) for tiles in lists)]


def candidates(case: gpu_floor.Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Tiles by their description, the default first. E.g. "64 rows, 32 keys, 4 warps, 3 stages"."""
    if case.kind == "gptq":
        found = gptq_candidates(case.rows, min(GROUP_SIZE, case.inputs), dtype)
        return {
            f"{t.rows} rows, {t.outputs} outputs, {t.inputs} inputs, {t.num_warps} warps, {t.num_stages} stages": t
            for t in found
        }
    arch = shape_architecture(case.model)
    default = triton_paged.tile_sizes(AttentionSpec.from_arch(arch, dtype, torch.device(device), BLOCK_SIZE))
    if case.kind == "prompt":
        return {in_words(tiles.chunk): tiles for tiles in chunk_candidates(default)}
    return {f"{in_words(t.single)}, {t.split_kv} keys per part": t for t in single_candidates(default)}


def in_words(tile: Tile) -> str:
    return f"{tile.rows} rows, {tile.keys} keys, {tile.num_warps} warps, {tile.num_stages} stages"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Which cases of gpu_floor.cases are run, and how many candidates of each beside the default."""

    model: str
    decodes: tuple[tuple[int, int], ...]  # (requests, tokens of each)
    prompts: tuple[int, ...]
    most: int | None = None


LINEARS = ("gate_up", "down")  # one with many outputs, one with many inputs
SECONDS = 2.0  # of one candidate: it is compiled, checked and timed
SHOWN = ("us", "of_floor", "refused")
OURS = {
    "cuda": Sizes("qwen3-8b", ((1, 1024), (32, 1024), (256, 1024), (1, 8192)), (1024, 8192)),
    "cpu": Sizes("tiny", ((3, 40),), (40,), most=2),
}


def is_refusal(error: Exception) -> bool:
    """Whether a compiler gave up, or the GPU has too little shared memory for the kernel: a matter of its tiles."""
    return isinstance(error, TritonError) or "PassManager" in str(error)  # of LLVM, in a plain RuntimeError


class Bench:
    """Measures candidates. The data of a case is kept until another case begins, which may need all the memory."""

    def __init__(self, device: str, hardware: Hardware, clock: Clock) -> None:
        self.device, self.hardware, self.clock = device, hardware, clock
        self.dtype = SIZES[device].dtype
        self.data: tuple[str, Contest, torch.Tensor] | None = None  # case, calls, torch's result

    @torch.inference_mode()
    def measure(self, case: gpu_floor.Case, words: str, tiles: Any, default: bool) -> list[Row]:
        contest, expected = self.data_of(case)
        assert contest.with_tiles is not None
        row: Row = {"case": name_of(case), "tiles": words, "default": default}
        start = time.perf_counter()
        ours = contest.with_tiles(tiles)
        try:
            result = ours()
        except (TritonError, RuntimeError) as error:
            if not is_refusal(error):
                raise
            return [row | {"refused": first_line(error)}]
        error_of(result, expected)
        first = time.perf_counter() - start
        seconds, floor = self.clock.time(ours).device, case.cost.floor(self.hardware)
        figures = {"us": round(1e6 * seconds, 2), "of_floor": round(floor / seconds, 3), "first_s": round(first, 2)}
        return [row | figures]

    def data_of(self, case: gpu_floor.Case) -> tuple[Contest, torch.Tensor]:
        if self.data is None or self.data[0] != case.name:
            self.data = None
            contest = CONTESTS[case.kind](case, self.dtype, self.device)
            self.data = (case.name, contest, contest.torchs())
        return self.data[1:]

    def cases(self, sizes: Sizes) -> list[Case]:
        rows, found = SIZES[self.device].rows, []
        for case in gpu_floor.cases(sizes.model, processors(self.device), sizes.decodes, sizes.prompts, (), rows):
            if case.kind == "gptq" and case.linear not in LINEARS:
                continue
            chosen = list(candidates(case, self.dtype, self.device).items())[: sizes.most and 1 + sizes.most]
            for index, (words, tiles) in enumerate(chosen):
                run = partial(self.measure, case, words, tiles, index == 0)
                found.append(Case(f"{name_of(case)}: {words}", run, SECONDS))
        return found


def choices(rows: Sequence[Row]) -> dict[str, Row]:
    """Case -> the default and the fastest candidate so far; of cases whose default ran."""
    found = {}
    for case, group in groupby((row for row in rows if "us" in row), lambda row: row["case"]):
        timed = list(group)
        best = min(timed, key=lambda row: row["us"])
        for default in (row for row in timed if row["default"]):
            found[case] = {
                "default": default["tiles"],
                "default_us": default["us"],
                "best": best["tiles"],
                "best_us": best["us"],
                "gain": round(default["us"] / best["us"], 3),
                "of_floor": best["of_floor"],
            }
    return found


def main() -> int:
    options = parse_options(__doc__ or "")
    hardware = measured_hardware(options)
    bench = Bench(options.device, hardware, make_clock(options.device, hardware))
    result = Result("tiles", "us", options, SHOWN, ceilings=ceilings(hardware), dtype=str(bench.dtype))
    result.complete = lambda rows: result.content.update(choices=choices(rows))
    return result.run(bench.cases(OURS[options.device]))


if __name__ == "__main__":
    sys.exit(main())
