"""Builds the C++ operators of this folder once per machine and level, and loads them.

Milestone: M4. vLLM counterpart: CMakeLists.txt and cmake/cpu_extension.cmake, which run when its wheel is built.
`load_ops()` returns `torch.ops.folovllm`, or None if there is no compiler: every caller has a pure-torch path.
`load_ops("avx2")` returns `torch.ops.folovllm_avx2`, the same operators compiled for fewer instructions (levels.py).
`python -m folovllm.csrc.build [--cpu-isa avx2]` builds ahead of time.

The operators register themselves with TORCH_LIBRARY, so the library needs no Python.h and serves every Python version.
We call the compiler directly: torch.utils.cpp_extension takes a second to import, and its lock is a file whose mere
existence means that a build is running, so that a build that was killed blocks every later one forever.

    <cache>/<key>/folovllm_ops.so     complete: it appears with one rename
    <cache>/<key>.failed              the compiler's messages; no process tries again until the key changes
    <cache>/.building-xxxx/           of a running build, or left by one that was killed; the next build removes it
    <cache>/.lock                     held while building; the operating system frees it when the process ends
"""

import argparse
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from folovllm.config import CPU_ISAS
from folovllm.csrc.compilers import COMPILERS, BuildError, Compiler, find_compiler, how_to_install
from folovllm.csrc.levels import NATIVE, level_named, namespace_of

SOURCE_DIR = Path(__file__).parent
LIBRARY = "folovllm_ops.so"
# torch's headers take five seconds of every run of the compiler, and these sources, which no step of the engine runs,
# less than one. So they are compiled as one file. The kernels are not: what the compiler inlines depends on the size of
# the file.
SMALL_SOURCES = (
    "compiled_for",
    "core_round_trip",
    "int4_pack",
    "reference_attention",
    "reference_linear",
    "thread_team_ops",
)
JOINED = "small_sources.cpp"
# No -ffast-math: the kernels compute with infinities. Hidden symbols, and (for g++) no symbols that are unique in the
# process: two levels in one process must not share a function or a static variable of the headers that they include.
FLAGS = ("-std=c++20", "-O3", "-pthread", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
GCC_FLAGS = ("-fno-gnu-unique",)  # clang makes no such symbols and refuses the flag
LIMITED_FLAGS = ("-mtune=native",)  # fewer instructions, arranged for this CPU
NO_PREFETCH = "-DFOLOVLLM_NO_PREFETCH"  # an extra flag: prefetch.h then compiles to nothing, for reading and measuring


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "folovllm" / "ops"


def load_ops(isa: str = NATIVE, cache_dir: Path | None = None) -> Any | None:
    """Returns `torch.ops.folovllm` with our operators, built first if necessary. If that fails: None and a warning.

    `isa`, a level, limits the instructions that they use. Raises ValueError if this CPU lacks some of them.
    """
    level_named(isa)
    return _load_ops(isa, cache_dir or default_cache_dir())


def loaded_ops(isa: str = NATIVE) -> Any | None:
    """Returns the operators of a level if they are loaded, else None. Builds nothing."""
    ops = getattr(torch.ops, namespace_of(isa))
    return ops if hasattr(ops, "paged_attention") else None


@functools.cache  # one library of each level, and one warning, per process
def _load_ops(isa: str, cache_dir: Path) -> Any | None:
    try:
        library = build(cache_dir, isa=isa)
        if loaded_ops(isa) is None:  # operators can be registered only once
            torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        warnings.warn(f"the C++ kernels are not available, slower torch ones run instead: {error}", stacklevel=3)
        return None
    return getattr(torch.ops, namespace_of(isa))


def compiled_for(ops: Any) -> frozenset[str]:
    """The instruction sets that a library was compiled for. E.g. {"avx2", "fma", "f16c"}."""
    return frozenset(ops.compiled_for().split())


def find_library(cache_dir: Path, isa: str = NATIVE) -> Path | None:
    """Path of the library of a level if it has been built, else None. Builds nothing."""
    compiler = find_compiler()
    library = None if compiler is None else _target(cache_dir, SOURCE_DIR, compiler, (), isa) / LIBRARY
    return library if library is not None and library.exists() else None


def build(cache_dir: Path, source_dir: Path = SOURCE_DIR, extra_flags: tuple[str, ...] = (), isa: str = NATIVE) -> Path:
    """Path of the library for these sources, flags and level, this torch and this CPU. It is compiled if it is missing.

    Raises BuildError if there is no compiler or if it fails, OSError if the cache cannot be written, and ValueError if
    this CPU cannot run the level.
    """
    level_named(isa)
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler found (looked for {', '.join(COMPILERS)}); install one: {how_to_install()}")
    target = _target(cache_dir, source_dir, compiler, extra_flags, isa)
    library = target / LIBRARY
    if library.exists():
        return library
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / ".lock"):
        if not library.exists():  # another process may have built it while we waited
            _build_locked(compiler, isa, extra_flags, sorted(source_dir.glob("*.cpp")), target)
    return library


def _target(cache_dir: Path, source_dir: Path, compiler: str, extra_flags: tuple[str, ...], isa: str) -> Path:
    """The folder of a library. Its name depends on the flags that we want, not on those that the compiler takes."""
    files = [*sorted(source_dir.glob("*.cpp")), *sorted(source_dir.glob("*.h"))]
    wanted = (isa, *level_named(isa).flags, *extra_flags)
    return cache_dir / cache_key(files, compiler, wanted)


def cache_key(sources: Iterable[Path], compiler: str, extra_flags: tuple[str, ...] = ()) -> str:
    """A name that changes with everything that the library depends on."""
    digest = hashlib.sha256()
    binary = Path(compiler).resolve()
    tool = (str(binary), str(binary.stat().st_mtime_ns))
    facts = (torch.__version__, cpu_features(), *tool, *FLAGS, *GCC_FLAGS, *LIMITED_FLAGS, *extra_flags)
    for text in (*facts, *(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


def cpu_features() -> str:
    """What -march=native depends on: on Linux the CPU's list of features, elsewhere the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("flags", "Features", "model name")  # x86, Arm
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _build_locked(compiler: str, isa: str, extra_flags: tuple[str, ...], sources: list[Path], target: Path) -> None:
    """Compiles into a temporary folder and renames it to `target`. The caller holds the lock."""
    failed = target.with_name(target.name + ".failed")
    if failed.exists():
        raise BuildError(f"they did not compile here before, see {failed}; delete it to try again")
    for abandoned in target.parent.glob(".building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    limit = "" if isa == NATIVE else f" for cpu_isa={isa!r}"
    print(f"folovllm: building the CPU kernels{limit} once (about a minute on 2 cores)...", file=sys.stderr, flush=True)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        flags = compile_flags(Compiler(compiler, temporary), isa)
        _compile([compiler, *flags, *extra_flags], sources, temporary)
        os.replace(temporary, target)
    except BuildError as error:
        failed.write_text(str(error), encoding="utf-8")
        raise BuildError(f"{str(error).splitlines()[0]}; the compiler's messages are in {failed}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def compile_flags(compiler: Compiler, isa: str) -> list[str]:
    """The flags of a level that the compiler accepts. Raises BuildError if it refuses one that must be there."""
    flags = compiler.require(FLAGS, f"which FoloVLLM needs; install a newer one: {how_to_install()}")
    flags += compiler.first_accepted(level_named(isa).flags, f"which cpu_isa={isa!r} needs; a newer compiler may")
    flags += compiler.accepted(GCC_FLAGS)
    if isa == NATIVE:
        return flags
    return [*flags, *compiler.accepted(LIMITED_FLAGS), f"-Dfolovllm={namespace_of(isa)}"]


def _compile(command: list[str], sources: list[Path], folder: Path) -> None:
    """Compiles the sources, then links them into one library. `command`: the compiler and its flags."""
    torch_dir = Path(torch.__file__).parent
    includes = [f"-I{torch_dir / 'include'}", f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
    command = [*command, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *includes]
    objects = {source: folder / f"{source.stem}.o" for source in _translation_units(sources, folder)}
    _run_all([[*command, "-c", str(source), "-o", str(built)] for source, built in objects.items()])
    # On Linux they are found by name, because torch has loaded them. macOS looks for their files.
    libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_dir / 'lib'}"]
    _run_all([[*command, "-shared", *map(str, objects.values()), *libraries, "-o", str(folder / LIBRARY)]])
    for path in (*objects.values(), folder / JOINED):
        path.unlink(missing_ok=True)


def _translation_units(sources: list[Path], folder: Path) -> list[Path]:
    """The files to compile, longest first: each kernel by itself, and one that includes the small sources."""
    small = [source for source in sources if source.stem in SMALL_SOURCES]
    joined = folder / JOINED
    joined.write_text("".join(f'#include "{source}"\n' for source in small), encoding="utf-8")
    kernels = [source for source in sources if source not in small]
    return [*([joined] if small else []), *sorted(kernels, key=lambda source: source.stat().st_size, reverse=True)]


def _run_all(commands: list[list[str]]) -> None:
    """Runs commands, as many at once as there are cores. Raises BuildError with the output of the first that fails."""
    running: list[subprocess.Popen[str]] = []

    def run(command: list[str]) -> tuple[int, str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
        output, _ = process.communicate()
        return process.returncode, output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            results = list(pool.map(run, commands))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:  # after Ctrl-C: leave no compiler behind
                if process.poll() is None:
                    process.kill()
    for command, (status, output) in zip(commands, results, strict=True):
        if status != 0:
            raise BuildError(f"the compiler stopped with status {status}\n{' '.join(command)}\n{output}")


def main() -> int:
    """Builds ahead of time. Returns 0 if every library that was asked for is there, 1 if one cannot be built here."""
    parser = argparse.ArgumentParser(description="Builds FoloVLLM's C++ kernels for this machine.")
    parser.add_argument("cache_dir", nargs="?", type=Path, default=default_cache_dir(), help="where they are kept")
    isa_help = "limit their instructions, as the engine argument cpu_isa does; may be given several times"
    parser.add_argument("--cpu-isa", action="append", choices=CPU_ISAS, help=isa_help)
    args = parser.parse_args()
    for failed in args.cache_dir.glob("*.failed"):  # a user who calls this by hand wants another attempt
        failed.unlink()
    try:
        for isa in args.cpu_isa or [NATIVE]:
            print(f"folovllm: the CPU kernels are in {build(args.cache_dir, isa=isa)}")
    except (BuildError, OSError, ValueError) as error:
        print(f"folovllm: the CPU kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
