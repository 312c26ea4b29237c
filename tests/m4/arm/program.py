"""The kernels of folovllm/csrc as a program for Arm, which QEMU runs on this machine.

Milestone: M4. vLLM counterpart: none. `build_program` compiles kernels.cpp with Zig, a C++ compiler that is a Python
package and brings along what it needs for other systems. `ArmProgram` has the operators of torch.ops.folovllm that
the program knows, with the same arguments, so that a test calls either of them.
"""

import importlib.util
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from folovllm.csrc.build import SOURCE_DIR

ROOT = Path(__file__).resolve().parents[3]
INCLUDES = (f"-I{Path(torch.__file__).parent / 'include'}", f"-I{SOURCE_DIR}")
# As build.py compiles, but with little optimisation: the program is emulated, so compiling takes longer than running.
# -UNDEBUG: with NDEBUG, torch declares a function of glibc's that musl declares otherwise.
FLAGS = ("-std=c++20", "-O1", "-UNDEBUG", "-Wno-unknown-pragmas", "-Wno-pass-failed", "-fno-sanitize=undefined")
PROGRAM_FLAGS = ("-fno-exceptions", "-DFOLOVLLM_NO_CXX_LIBRARY")
# What is compiled for, and the CPU that is emulated. A Cortex-A72 (of 2015) has no instruction beyond the baseline.
CPUS = {"baseline": ("generic", "cortex-a72"), "bf16": ("generic+bf16+dotprod+i8mm", "max,sve=off")}


def find_qemu() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def has_zig() -> bool:
    return importlib.util.find_spec("ziglang") is not None


def run_zig(command: str, target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `zig c++` or `zig cc`. Zig keeps what it has compiled, so that the same call takes no time again."""
    return subprocess.run(
        [sys.executable, "-m", "ziglang", command, "-target", target, *arguments], capture_output=True, text=True
    )


def build_program(folder: Path, cpu: str) -> "ArmProgram":
    """Compiles the program for one of CPUS. Linked with `cc`, it needs no C++ library."""
    compiled_for, emulated = CPUS[cpu]
    built, program, target = folder / f"{cpu}.o", folder / cpu, "aarch64-linux-musl"
    flags = (*FLAGS, *PROGRAM_FLAGS, *INCLUDES, f"-mcpu={compiled_for}")
    for command, arguments in (
        ("c++", (*flags, "-c", str(Path(__file__).parent / "kernels.cpp"), "-o", str(built))),
        ("cc", ("-s", str(built), "-o", str(program))),
    ):
        done = run_zig(command, target, *arguments)
        assert done.returncode == 0, done.stderr
    qemu = find_qemu()
    assert qemu is not None
    return ArmProgram((qemu, "-cpu", emulated, str(program)))


@dataclass(frozen=True)
class ArmProgram:
    """The program for one CPU. `command` runs it."""

    command: tuple[str, ...]

    def features(self) -> str:
        return self._run("features", "-").decode().strip()

    def linear_packed(
        self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int
    ) -> torch.Tensor:
        return self._rows("linear_packed", x, [packed, bias], x.shape[1], out_features, width=out_features)

    def linear_silu_packed(self, x: torch.Tensor, packed: torch.Tensor, out_features: int) -> torch.Tensor:
        return self._rows("linear_silu_packed", x, [packed, None], x.shape[1], out_features, width=out_features)

    def linear_int4(
        self, x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, perm: torch.Tensor,
        bias: torch.Tensor, out_features: int, gated: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert perm.numel() == 0, "the program does not permute"
        sizes = (levels.shape[1], levels.shape[2], out_features, int(gated))
        return self._rows("linear_int4", x, [levels, scales, zeros, bias], *sizes, width=out_features)

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        tokens, kv_heads, head_size = key.shape
        sizes = (tokens, kv_heads, head_size, kv_cache.shape[0], kv_cache.shape[3] // head_size)
        written = self._run("write_kv", _type(key), *sizes, tensors=[key, value, kv_cache, slots])
        kv_cache.copy_(_tensor(written, kv_cache.dtype).view(kv_cache.shape))

    def paged_attention(
        self, out: torch.Tensor, query: torch.Tensor, kv_cache: torch.Tensor, query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor, block_table: torch.Tensor, scale: float,
    ) -> None:  # fmt: skip
        blocks, kv_heads, _, page = kv_cache.shape
        heads, head_size = query.shape[1:]
        sizes = (len(seq_lens), heads, kv_heads, head_size, blocks, page // head_size, block_table.shape[1], scale)
        tensors = [query, kv_cache, query_start_loc, seq_lens, block_table]
        result = self._run("paged_attention", _type(query), *sizes, tensors=tensors)
        out.copy_(_tensor(result, out.dtype).view(out.shape))

    def rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """The normalised rows, and behind them the rows of the new residual if there is one."""
        return self._rows("rms_norm", x, [residual, weight], x.shape[1], eps, width=x.shape[1])

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        return self._rows("silu_and_mul", x, [], x.shape[1] // 2, width=x.shape[1] // 2)

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        return _tensor(self._run("argmax", _type(x), *x.shape, tensors=[x]), torch.int64)

    def _rows(
        self, name: str, x: torch.Tensor, others: list[torch.Tensor | None], *numbers: float, width: int
    ) -> torch.Tensor:
        """An operator on rows x [rows, ...] -> [rows, width]."""
        result = self._run(name, _type(x), x.shape[0], *numbers, tensors=[x, *others])
        return _tensor(result, x.dtype).view(-1, width)

    def _run(self, *words: object, tensors: list[torch.Tensor | None] | tuple[()] = ()) -> bytes:
        data = b"".join(struct.pack("<q", len(part)) + part for part in map(_bytes, tensors))
        done = subprocess.run([*self.command, *map(str, words)], input=data, capture_output=True)
        assert done.returncode == 0, f"status {done.returncode}: {done.stderr.decode()}"
        return done.stdout


def _type(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _bytes(x: torch.Tensor | None) -> bytes:
    return b"" if x is None else x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
