"""Builds the C++ operators of this folder once per machine, and loads them.

Milestone: M4. vLLM counterpart: CMakeLists.txt and cmake/cpu_extension.cmake, which run when its wheel is built.
`load_ops()` answers `torch.ops.folovllm`, or None where there is no compiler: every caller has a pure-torch path.
`python -m folovllm.csrc.build` builds ahead of time.

The operators register themselves with TORCH_LIBRARY, so the library needs no Python.h and serves every Python version.
We call the compiler directly: torch.utils.cpp_extension takes a second to import, and its lock is a file whose mere
existence means "somebody builds", so that a build that was killed blocks every later one for ever.

    <cache>/<key>/folovllm_ops.so     complete: it appears with one rename
    <cache>/<key>.failed              the compiler's words; nobody tries again until the key changes
    <cache>/.building-xxxx/           at work, or left by a build that was killed; the next builder removes it
    <cache>/.lock                     held while building; the operating system frees it when its owner dies
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
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC")


class BuildError(Exception):
    """No library, and why."""


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "folovllm" / "ops"


def load_ops(cache_dir: Path | None = None) -> Any | None:
    """`torch.ops.folovllm` with our operators, built first if need be; None, after one warning, where that fails."""
    return _load_ops(cache_dir or default_cache_dir())


def loaded_ops() -> Any | None:
    """`torch.ops.folovllm` if somebody has loaded our operators; None otherwise. Builds nothing."""
    return torch.ops.folovllm if hasattr(torch.ops.folovllm, "paged_attention") else None


@functools.cache  # one library, and one warning, per process
def _load_ops(cache_dir: Path) -> Any | None:
    try:
        library = build(cache_dir)
        if loaded_ops() is None:  # operators can be registered only once
            torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        warnings.warn(f"the C++ kernels are not available, slower torch ones run instead: {error}", stacklevel=3)
        return None
    return torch.ops.folovllm


def build(cache_dir: Path, source_dir: Path = SOURCE_DIR) -> Path:
    """Path of the library for these sources, this torch and this CPU, compiled if it is not there yet.

    Raises BuildError without a compiler or when it fails, OSError when the cache cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler found (looked for {', '.join(COMPILERS)}); install one, e.g. g++")
    sources = sorted(source_dir.glob("*.cpp"))
    target = cache_dir / cache_key(sources + sorted(source_dir.glob("*.h")), compiler)
    library = target / LIBRARY
    if library.exists():
        return library
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / ".lock"):
        if not library.exists():  # another process may have built it while we waited
            _build_locked(compiler, sources, target)
    return library


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def cache_key(sources: Iterable[Path], compiler: str) -> str:
    """A name that changes with anything that the library depends on."""
    digest = hashlib.sha256()
    binary = Path(compiler).resolve()
    facts = (torch.__version__, cpu_features(), str(binary), str(binary.stat().st_mtime_ns), *FLAGS)
    for text in (*facts, *(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


def cpu_features() -> str:
    """What -march=native depends on: on Linux the CPU's own list, elsewhere the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("flags", "Features", "model name")  # x86, Arm
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _build_locked(compiler: str, sources: list[Path], target: Path) -> None:
    """Compile into a temporary folder and rename it to `target`. Only the holder of the lock is here."""
    failed = target.with_name(target.name + ".failed")
    if failed.exists():
        raise BuildError(f"they did not compile here before, see {failed}; delete it to try again")
    for abandoned in target.parent.glob(".building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    print("folovllm: building the CPU kernels once (about 40 s on 2 cores)...", file=sys.stderr, flush=True)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        _compile(compiler, sources, temporary)
        os.replace(temporary, target)
    except BuildError as error:
        failed.write_text(str(error), encoding="utf-8")
        raise BuildError(f"{str(error).splitlines()[0]}; the compiler's words are in {failed}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _compile(compiler: str, sources: list[Path], folder: Path) -> None:
    """Each source on its own, all at once, then one library of them."""
    torch_dir = Path(torch.__file__).parent
    includes = [f"-I{torch_dir / 'include'}", f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    objects = [folder / f"{source.stem}.o" for source in sources]
    _run_all(
        [
            [compiler, *FLAGS, abi, *includes, "-c", str(source), "-o", str(built)]
            for source, built in zip(sources, objects, strict=True)
        ]
    )
    libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]  # found again by name: torch has loaded them
    _run_all([[compiler, *FLAGS, "-shared", *map(str, objects), *libraries, "-o", str(folder / LIBRARY)]])
    for built in objects:
        built.unlink()


def _run_all(commands: list[list[str]]) -> None:
    """Run commands side by side; BuildError with the output of the first that fails."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        outputs = [process.communicate()[0] for process in running]
    finally:
        for process in running:  # Ctrl-C: leave no compiler behind
            if process.poll() is None:
                process.kill()
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode != 0:
            raise BuildError(f"the compiler stopped with status {process.returncode}\n{' '.join(command)}\n{output}")


def main() -> int:
    """`python -m folovllm.csrc.build [cache_dir]`: 0 built or already there, 1 not possible here."""
    cache_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else default_cache_dir()
    for failed in cache_dir.glob("*.failed"):  # whoever calls this by hand wants another attempt
        failed.unlink()
    try:
        print(f"folovllm: the CPU kernels are in {build(cache_dir)}")
    except (BuildError, OSError) as error:
        print(f"folovllm: the CPU kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
