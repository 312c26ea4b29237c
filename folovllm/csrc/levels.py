"""The levels of the C++ library: for which instructions it is compiled, and which of them this CPU has.

Milestone: M4. vLLM counterpart: cmake/cpu_extension.cmake, which looks at the CPU and at environment variables such as
VLLM_CPUAVX512BF16 when its wheel is built.

"native" uses every instruction that the CPU has. The other levels leave instructions out, so that one machine can test,
measure and show what a machine without them does. Each level is a library of its own whose C++ namespace, which is also
its torch namespace, has the level's name: `torch.ops.folovllm_avx2`. So one process can hold several of them.
"""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

NATIVE, PORTABLE = "native", "portable"
_ALIASES = {"AMD64": "x86_64", "arm64": "aarch64"}  # platform.machine() on Windows and on macOS


@dataclass(frozen=True)
class Level:
    """Compiler flags, best first: the first that the compiler accepts is used. `needs`: features of the CPU."""

    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()  # as torch.cpu.get_capabilities() names them


AVX2 = ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt")  # x86-64-v3
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")  # x86-64-v4: no bf16, no VNNI
# By architecture; from the most instructions to the fewest.
LEVELS: dict[str, dict[str, Level]] = {
    "x86_64": {
        NATIVE: Level(("-march=native",)),
        "avx512": Level(("-march=x86-64-v4",), AVX512),
        "avx2": Level(("-march=x86-64-v3",), AVX2),
        PORTABLE: Level(("-march=x86-64",)),
    },
    "aarch64": {
        NATIVE: Level(("-mcpu=native", "-mcpu=apple-m1")),  # the second for an Apple clang that lacks the first
        PORTABLE: Level(("-march=armv8-a",)),
    },
}
_OTHERS = {NATIVE: Level(("-march=native", "-mcpu=native")), PORTABLE: Level(())}


def levels_of(machine: str) -> Mapping[str, Level]:
    """The levels of an architecture, as platform.machine() calls it."""
    return LEVELS.get(_ALIASES.get(machine, machine), _OTHERS)


def cpu_capabilities() -> dict[str, Any]:
    """Returns what torch knows of the CPU, e.g. {"avx2": True, ...}. A torch before 2.13 may know nothing: {}."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def levels_here() -> list[str]:
    """The levels that this CPU can run, from the most instructions to the fewest."""
    return [name for name, level in levels_of(platform.machine()).items() if not missing(level.needs)]


def missing(needs: Iterable[str]) -> list[str]:
    """Those of `needs` that this CPU lacks."""
    capabilities = cpu_capabilities()
    return [name for name in needs if not capabilities.get(name)]


def level_named(isa: str) -> Level:
    """The level called `isa`. Raises ValueError if this CPU cannot run it."""
    machine = platform.machine()
    levels, here = levels_of(machine), levels_here()
    use = f"use one of {', '.join(map(repr, here))}"
    if isa not in levels:
        raise ValueError(f"cpu_isa={isa!r} is no level of {machine} processors: {use}")
    lacking = missing(levels[isa].needs)
    if lacking:
        best = f"the best level that it has beside 'native' is {here[1]!r}"
        raise ValueError(f"cpu_isa={isa!r} needs {', '.join(lacking)}, which this CPU lacks; {best}: {use}")
    return levels[isa]


def namespace_of(isa: str) -> str:
    """The namespace of a level's operators, in C++ and below torch.ops."""
    return "folovllm" if isa == NATIVE else f"folovllm_{isa}"
