"""Every source of the C++ library compiles for the systems that no test can run: macOS and Linux on Arm.

Milestone: M4. Zig compiles with clang and the systems' own headers. Nothing is linked and nothing runs: what is shown is
that no source needs a header or an instruction that is not there.
"""

from pathlib import Path

import pytest
import torch

from folovllm.csrc.build import SOURCE_DIR
from tests.m4.arm.program import FLAGS, INCLUDES, has_zig, run_zig

pytestmark = [
    pytest.mark.m4,
    pytest.mark.slow,  # torch's headers take some 5 s for each file
    pytest.mark.skipif(not has_zig(), reason="the Python package ziglang is not installed"),
]

TORCH_INCLUDES = (*INCLUDES, f"-I{Path(torch.__file__).parent / 'include/torch/csrc/api/include'}")
# What the compiler is asked for on a Mac with an M2 or later, and on the oldest 64-bit Arm CPU under Linux.
TARGETS = {"aarch64-macos": "-mcpu=apple_m2", "aarch64-linux-gnu": "-mcpu=generic"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", sorted(SOURCE_DIR.glob("*.cpp")), ids=lambda path: path.name)
def test_it_compiles(source: Path, target: str, tmp_path: Path) -> None:
    flags = (*FLAGS, "-fPIC", *TORCH_INCLUDES, TARGETS[target])
    done = run_zig("c++", target, *flags, "-c", str(source), "-o", str(tmp_path / "built.o"))
    assert done.returncode == 0, done.stderr
