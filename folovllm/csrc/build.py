"""Builds the C++ operators of this folder once per machine, and loads them.

Milestone: M4. vLLM counterpart: CMakeLists.txt and cmake/cpu_extension.cmake, which run when its wheel is built.
`load_ops()` returns `torch.ops.folovllm`, or None if there is no compiler: every caller has a pure-torch path.
`python -m folovllm.csrc.build` builds ahead of time.

The operators register themselves with TORCH_LIBRARY, so the library needs no Python.h and serves every Python version.
We call the compiler directly: torch.utils.cpp_extension takes a second to import, and its lock is a file whose mere
existence means that a build is running, so that a build that was killed blocks every later one forever.

    <cache>/<key>/folovllm_ops.so     complete: it appears with one rename
    <cache>/<key>.failed              the compiler's messages; no process tries again until the key changes
    <cache>/.building-xxxx/           of a running build, or left by one that was killed; the next build removes it
    <cache>/.lock                     held while building; the operating system frees it when the process ends
"""

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
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

SOURCE_DIR = Path(__file__).parent
LIBRARY = "folovllm_ops.so"
COMPILERS = ("g++", "clang++", "c++")
# -march=native: the library stays on the machine that built it. No -ffast-math: the kernels compute with infinities.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-pthread", "-fPIC")
NO_PREFETCH = "-DFOLOVLLM_NO_PREFETCH"  # an extra flag: prefetch.h then compiles to nothing, for reading and measuring


class BuildError(Exception):
    """There is no library; the message says why."""


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "folovllm" / "ops"


def load_ops(cache_dir: Path | None = None) -> Any | None:
    """Returns `torch.ops.folovllm` with our operators, built first if necessary. If that fails: None and a warning."""
    return _load_ops(cache_dir or default_cache_dir())


def _loaded_ops() -> Any | None:
    """Returns `torch.ops.folovllm` if our operators are loaded, else None. Builds nothing."""
    return torch.ops.folovllm if hasattr(torch.ops.folovllm, "paged_attention") else None


@functools.cache  # one library, and one warning, per process
def _load_ops(cache_dir: Path) -> Any | None:
    try:
        library = build(cache_dir)
        if _loaded_ops() is None:  # operators can be registered only once
            torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        warnings.warn(f"the C++ kernels are not available, slower torch ones run instead: {error}", stacklevel=3)
        return None
    return torch.ops.folovllm


def build(cache_dir: Path, source_dir: Path = SOURCE_DIR, extra_flags: tuple[str, ...] = ()) -> Path:
    """Path of the library for these sources and flags, this torch and this CPU, compiled if it is not there yet.

    Raises BuildError if there is no compiler or if it fails, and OSError if the cache cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler found (looked for {', '.join(COMPILERS)}); install one, e.g. g++")
    sources = sorted(source_dir.glob("*.cpp"))
    target = cache_dir / cache_key(sources + sorted(source_dir.glob("*.h")), compiler, extra_flags)
    library = target / LIBRARY
    if library.exists():
        return library
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / ".lock"):
        if not library.exists():  # another process may have built it while we waited
            _build_locked([compiler, *FLAGS, *extra_flags], sources, target)
    return library


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def cache_key(sources: Iterable[Path], compiler: str, extra_flags: tuple[str, ...] = ()) -> str:
    """A name that changes with everything that the library depends on."""
    digest = hashlib.sha256()
    binary = Path(compiler).resolve()
    facts = (torch.__version__, cpu_features(), str(binary), str(binary.stat().st_mtime_ns), *FLAGS, *extra_flags)
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


def _build_locked(command: list[str], sources: list[Path], target: Path) -> None:
    """Compiles into a temporary folder and renames it to `target`. The caller holds the lock."""
    failed = target.with_name(target.name + ".failed")
    if failed.exists():
        raise BuildError(f"they did not compile here before, see {failed}; delete it to try again")
    for abandoned in target.parent.glob(".building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    print("folovllm: building the CPU kernels once (about 40 s on 2 cores)...", file=sys.stderr, flush=True)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        _compile(command, sources, temporary)
        os.replace(temporary, target)
    except BuildError as error:
        failed.write_text(str(error), encoding="utf-8")
        raise BuildError(f"{str(error).splitlines()[0]}; the compiler's messages are in {failed}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _compile(command: list[str], sources: list[Path], folder: Path) -> None:
    """Compiles the sources side by side, then links them into one library. `command`: the compiler and its flags."""
    torch_dir = Path(torch.__file__).parent
    includes = [f"-I{torch_dir / 'include'}", f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    objects = [folder / f"{source.stem}.o" for source in sources]
    _run_all(
        [
            [*command, abi, *includes, "-c", str(source), "-o", str(built)]
            for source, built in zip(sources, objects, strict=True)
        ]
    )
    libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]  # found by name: torch has loaded them
    _run_all([[*command, "-shared", *map(str, objects), *libraries, "-o", str(folder / LIBRARY)]])
    for built in objects:
        built.unlink()


def _run_all(commands: list[list[str]]) -> None:
    """Runs commands side by side. Raises BuildError with the output of the first that fails."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        outputs = [process.communicate()[0] for process in running]
    finally:
        for process in running:  # after Ctrl-C: leave no compiler behind
            if process.poll() is None:
                process.kill()
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode != 0:
            raise BuildError(f"the compiler stopped with status {process.returncode}\n{' '.join(command)}\n{output}")


def main() -> int:
    """`python -m folovllm.csrc.build [cache_dir]`. Returns 0 if the library is there, 1 if it cannot be built here."""
    cache_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else default_cache_dir()
    for failed in cache_dir.glob("*.failed"):  # a user who calls this by hand wants another attempt
        failed.unlink()
    try:
        print(f"folovllm: the CPU kernels are in {build(cache_dir)}")
    except (BuildError, OSError) as error:
        print(f"folovllm: the CPU kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
