"""Building the C++ operators: cached by what they depend on, safe against kills and races, optional.

Milestone: M4. A "compiler" here is mostly a shell script: what is tested is our handling of it, not g++.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from folovllm.csrc import build as builder
from folovllm.csrc import compilers

pytestmark = pytest.mark.m4

SOURCE = """
#include <torch/library.h>
static int64_t answer() { return ANSWER; }
TORCH_LIBRARY_FRAGMENT(NAMESPACE, m) { m.def("answer() -> int", &answer); }
"""
# Accepts every flag but {refused}. Notes each start in a file, takes a second, then writes what -o names.
FAKE_COMPILER = """#!/bin/sh
for word in "$@"; do
    case "$word" in {refused}) echo "I do not know $word"; exit 1;; esac
done
case "$*" in *probe.cpp*) exit 0;; esac
echo "$@" >> "{log}"
sleep {seconds}
while [ "$1" != "-o" ]; do shift; done
echo built > "$2"
"""
BUILD = "from pathlib import Path; from folovllm.csrc import build, compilers; compilers.COMPILERS = ({compiler!r},); "
BUILD += "print(build.build(Path({cache!r}), Path({sources!r})))"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "a.cpp").write_text(SOURCE.replace("ANSWER", "42").replace("NAMESPACE", "folovllm_build_test"))
    return folder


def fake_compiler(tmp_path: Path, seconds: float, refused: str = "nothing") -> tuple[Path, Path]:
    """(compiler, file with one line per call). `refused`: flags that it does not know, separated by |."""
    compiler, log = tmp_path / "fake-g++", tmp_path / "calls.log"
    compiler.write_text(FAKE_COMPILER.format(log=log, seconds=seconds, refused=refused))
    compiler.chmod(0o755)
    return compiler, log


def start_build(compiler: Path, cache: Path, sources: Path) -> "subprocess.Popen[str]":
    code = BUILD.format(compiler=str(compiler), cache=str(cache), sources=str(sources))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def calls(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(condition: "object", timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.mark.skipif(builder.find_compiler() is None, reason="no C++ compiler")
def test_a_real_build_loads_and_is_built_once(
    tmp_path: Path, sources: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    cache = tmp_path / "cache"
    library = builder.build(cache, sources)
    assert "building the CPU kernels once" in capfd.readouterr().err
    torch.ops.load_library(str(library))
    assert torch.ops.folovllm_build_test.answer() == 42
    monkeypatch.setattr(builder, "_compile", None)  # a second build would fail
    assert builder.build(cache, sources) == library
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in cache.iterdir()) == [".lock", library.parent.name]
    assert [path.name for path in library.parent.iterdir()] == [builder.LIBRARY]


def test_killed_build_leaves_nothing_in_the_way(tmp_path: Path, sources: Path) -> None:
    cache = tmp_path / "cache"
    compiler, log = fake_compiler(tmp_path, seconds=30)
    process = start_build(compiler, cache, sources)
    wait_for(lambda: calls(log) == 1)
    os.killpg(process.pid, signal.SIGKILL)  # the session that we started: the builder and its compiler
    process.communicate()
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []
    assert len(list(cache.glob(".building-*"))) == 1

    fake_compiler(tmp_path, seconds=0)
    second = start_build(compiler, cache, sources)
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert Path(output.strip()).read_text() == "built\n"
    assert list(cache.glob(".building-*")) == []


def test_two_processes_at_once_build_once(tmp_path: Path, sources: Path) -> None:
    cache = tmp_path / "cache"
    compiler, log = fake_compiler(tmp_path, seconds=1)
    both = [start_build(compiler, cache, sources) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert calls(log) == 2  # one object, one library
    assert sum("building" in errors for _, errors in outputs) == 1


def test_key_changes_with_everything_it_depends_on(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    compiler, _ = fake_compiler(tmp_path, seconds=0)
    files = [sources / "a.cpp"]

    def key(*extra_flags: str) -> str:
        return builder.cache_key(files, str(compiler), extra_flags)

    keys = [key()]
    assert key() == keys[0]
    files[0].write_text(files[0].read_text() + "// one more\n")
    keys.append(key())
    monkeypatch.setattr(torch, "__version__", "99.0")
    keys.append(key())
    monkeypatch.setattr(builder, "cpu_features", lambda: "flags : mmx")
    keys.append(key())
    os.utime(compiler, ns=(1, 1))
    keys.append(key())
    monkeypatch.setattr(builder, "FLAGS", ("-O0",))
    keys.append(key())
    keys.append(key(builder.NO_PREFETCH))
    assert len(set(keys)) == len(keys)


def test_no_compiler_is_none_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dnf" if name == "dnf" else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert builder.load_ops(cache_dir=tmp_path) is None
        assert builder.load_ops(cache_dir=tmp_path) is None
    assert len(caught) == 1
    assert "no C++ compiler" in str(caught[0].message) and "dnf install gcc-c++" in str(caught[0].message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(builder.find_compiler() is None, reason="no C++ compiler")
def test_broken_source_is_none_and_is_not_tried_again(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (sources / "a.cpp").write_text("this is no C++\n")
    cache = tmp_path / "cache"
    with pytest.raises(builder.BuildError, match="the compiler stopped with status 1"):
        builder.build(cache, sources)
    (failed,) = cache.glob("*.failed")
    assert "this is no C++" in failed.read_text() or "error" in failed.read_text()
    assert list(cache.glob(".building-*")) == []
    monkeypatch.setattr(builder, "_compile", None)
    with pytest.raises(builder.BuildError, match=r"delete it to try again"):
        builder.build(cache, sources)


def test_unwritable_cache_is_none_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    if builder.find_compiler() is None:
        pytest.skip("no C++ compiler")
    with pytest.warns(UserWarning, match="not available"):
        assert builder.load_ops(cache_dir=tmp_path / "file" / "cache") is None


def test_command_builds_ahead_and_tries_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    compiler, log = fake_compiler(tmp_path, seconds=0)
    monkeypatch.setattr(compilers, "COMPILERS", (str(compiler),))
    monkeypatch.setattr(sys, "argv", ["build", str(cache)])
    compiler.write_text("#!/bin/sh\necho no luck\nexit 3\n")
    assert builder.main() == 1
    assert "does not compile with -std=c++20" in capsys.readouterr().err
    assert "no luck" in next(cache.glob("*.failed")).read_text()
    stamp = compiler.stat().st_mtime_ns
    fake_compiler(tmp_path, seconds=0)
    os.utime(compiler, ns=(stamp, stamp))  # the same key as the attempt that failed
    assert builder.main() == 0
    assert "the CPU kernels are in" in capsys.readouterr().out
    kernels = {path.stem for path in builder.SOURCE_DIR.glob("*.cpp")} - set(builder.SMALL_SOURCES)
    assert calls(log) == len(kernels) + 2  # each kernel, the small sources together, and the library
    assert {path.stem for path in builder.SOURCE_DIR.glob("*.cpp")} >= set(builder.SMALL_SOURCES)
    assert list(cache.glob("*.failed")) == []


@pytest.mark.skipif(builder.find_compiler() is None, reason="no C++ compiler")
def test_asking_twice_and_elsewhere_gives_the_same_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = builder.load_ops()
    assert ops is not None and builder.load_ops() is ops
    monkeypatch.setattr(builder, "build", lambda *args, **kwargs: tmp_path / "never loaded: the operators are there")
    assert builder.load_ops(cache_dir=tmp_path) is ops
