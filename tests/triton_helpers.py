"""What the tests of the Triton kernels of M4 and M7 share: compiling for GPUs that are not here, and counting.

Triton's wheel has the compiler and NVIDIA's own tools, so machine code is made and examined without a GPU. Under
Triton's interpreter, every load, store and product passes through a builder, where `counted` looks at it.
"""

import contextlib
import re
import subprocess
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.sim.kernel_cost import Work

TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CAPABILITIES = (80, 86, 89, 90, 100, 120)  # A100; RTX 3090; RTX 4090 and L4; H100 and H200; B200; RTX 5090
MIN_WARPS = 8  # per multiprocessor, so that each of its 4 schedulers has another warp while one waits


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one multiprocessor share (CUDA C++ Programming Guide, "Compute Capabilities")."""

    shared: int  # KB; one program gets 1 KB less, and CUDA itself takes 1 KB per program
    warps: int
    programs: int
    tensor_memory: int = 0  # columns
    registers: int = 65_536


MULTIPROCESSORS = {
    80: Multiprocessor(164, 64, 32),
    86: Multiprocessor(100, 48, 16),
    89: Multiprocessor(100, 48, 24),
    90: Multiprocessor(228, 64, 32),
    100: Multiprocessor(228, 64, 32, tensor_memory=512),
    120: Multiprocessor(100, 48, 24),
}
SMALLEST_SHARED_MEMORY = min((each.shared - 1) * 1024 for each in MULTIPROCESSORS.values())  # tiles are for all GPUs
# What multiplies blocks of 64 rows and more. On all of them, 16 rows are multiplied by mma.sync.
MATRIX_UNITS = dict.fromkeys(CAPABILITIES, "mma.sync") | {90: "wgmma", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int  # per thread
    spilled: int  # bytes of memory per thread that stand in for registers
    shared: int  # bytes per program
    tensor_memory: int  # columns per program
    num_warps: int

    def programs(self, capability: int) -> int:
        """Returns how many programs fit on one multiprocessor at the same time. Registers come in eights per thread."""
        machine = MULTIPROCESSORS[capability]
        registers = -(-self.registers // 8) * 8 * 32 * self.num_warps
        return min(
            machine.programs,
            machine.warps // self.num_warps,
            machine.registers // registers,
            machine.shared * 1024 // (self.shared + 1024),
            machine.tensor_memory // self.tensor_memory if self.tensor_memory else machine.programs,
        )

    def warps(self, capability: int) -> int:
        return self.programs(capability) * self.num_warps


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], dtype: torch.dtype, capability: int,
    unaligned: Collection[str], **options: int,
) -> Any:  # fmt: skip
    """Returns the kernel compiled for a GPU of this capability, as a launch would compile it. No GPU is needed.

    An argument that is not in `types` is an int32, or a pointer to `dtype` if its name says so. Tensors begin at
    multiples of 16 bytes and sizes of layers are multiples of 16, so loads may be wide; `unaligned` names the others.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    plain = {arg: f"*{TRITON_NAMES[dtype]}" if arg.endswith("_ptr") else "i32" for arg in kernel.arg_names}
    signature = (
        plain | {arg: kind for arg, kind in types.items() if arg in plain} | dict.fromkeys(constants, "constexpr")
    )
    aligned: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if arg not in constants and arg not in unaligned
    }
    source = ASTSource(kernel, signature, dict(constants), aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage_of(compiled: Any, folder: Path) -> Usage:
    """What NVIDIA's own tool (in Triton's wheel) reports of the machine code, and what Triton will ask for."""
    import triton

    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.check_output([tool, "--dump-resource-usage", folder / "kernel.cubin"], text=True)
    (registers,), (stack,) = (map(int, re.findall(rf"{name}:(\d+)", report)) for name in ("REG", "STACK"))
    made = compiled.metadata
    return Usage(registers, stack, made.shared, getattr(made, "tmem_size", 0) or 0, made.num_warps)


def check_fits(what: str, compiled: Any, capability: int, folder: Path, most_spilled: int = 0) -> None:
    """The kernel fits on every GPU, with enough warps at once, nothing spilled, and no fp32 multiplied in TF32."""
    usage = usage_of(compiled, folder)
    print(f"{what}, {capability / 10}: {usage}, {usage.programs(capability)} programs per multiprocessor")
    assert usage.shared <= SMALLEST_SHARED_MEMORY
    assert usage.spilled <= most_spilled
    assert usage.warps(capability) >= MIN_WARPS
    assert "tf32" not in compiled.asm["ptx"]


def check_candidate(what: str, compiled: Any, capability: int, folder: Path, most_spilled: int) -> None:
    """Tiles that are only tried: they fit on the GPU that they are compiled for, hardly spilling, and without TF32."""
    usage = usage_of(compiled, folder)
    print(f"{what}, {capability / 10}: {usage}, {usage.programs(capability)} programs per multiprocessor")
    assert usage.programs(capability) >= 1
    assert usage.spilled <= most_spilled
    assert "tf32" not in compiled.asm["ptx"]


def loop_instructions(compiled: Any, folder: Path) -> int:
    """Returns how many instructions the longest loop of the kernel has: from a label to the branch back to it."""
    import triton

    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    listing = subprocess.run([tool, "-c", folder / "kernel.cubin"], text=True, capture_output=True, check=True).stdout
    labels: dict[str, int] = {}
    longest = number = 0
    for label, instruction in re.findall(r"^\s*(?:\.(L_\w+):|/\*[0-9a-f]+\*/\s+(.*?) ;)", listing, re.MULTILINE):
        if label:
            labels[label] = number
            continue
        number += 1
        target = re.search(r"\bBRA\b.*`\(\.(L_\w+)\)", instruction)
        if target and target[1] in labels:
            longest = max(longest, number - labels[target[1]])
    return longest


def matrix_units(compiled: Any) -> set[str]:
    """Returns the instructions of matrix units in the kernel. E.g. {"mma.sync"}; empty if it uses none."""
    return set(re.findall(r"\b(mma\.sync|wgmma(?=\.mma)|tcgen05\.mma)", compiled.asm["ptx"]))


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Work]]:
    """Counts what each kernel does while Triton interprets it: kernel -> Work.

    A load or store counts the numbers that its mask lets through. Operations are those of tl.dot. `gemv_kernel`
    multiplies without it: it subtracts the zero from each level, and multiplies every difference with one number.
    """
    from triton.runtime import interpreter

    works: dict[str, Work] = defaultdict(Work)
    current = [""]
    builder: Any = interpreter.InterpreterBuilder

    def watch(target: Any, name: str, work_of: Any) -> None:
        original = getattr(target, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            works[current[0]] += work_of(*args)
            return original(self, *args, **kwargs)

        patch.setattr(target, name, watched)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        current[0] = self.fn.__name__
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        call = interpreter.GridExecutor.__call__
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        watch(builder, "create_masked_load", lambda pointers, mask, *_: Work(read=_bytes(pointers, mask)))
        watch(builder, "create_masked_store", lambda pointers, value, mask, *_: Work(written=_bytes(pointers, mask)))
        watch(builder, "create_dot", lambda a, b, *_: Work(flops=2 * a.data.size * b.data.shape[-1]))
        watch(builder, "create_fsub", lambda a, b: Work(flops=2 * a.data.size * (current[0] == "gemv_kernel")))
        yield works


def _bytes(pointers: Any, mask: Any) -> int:
    return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
