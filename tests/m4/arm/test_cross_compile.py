"""Every source of the C++ library compiles for macOS on Arm, which no test can run.

Milestone: M4. Zig compiles with clang and the system's own headers. Nothing is linked and nothing runs: what is shown
is that no source needs a header or an instruction that is not there.
"""

from pathlib import Path

import pytest
import torch

from folovllm.csrc.build import SOURCE_DIR
from tests.m4.arm.program import FLAGS, INCLUDES, has_zig, run_zig

pytestmark = [
    pytest.mark.m4,
    pytest.mark.slow,  # torch's headers take some 5 s for each file
    pytest.mark.skipif(not has_zig(), reason="no Zig (pip install -e '.[arm]')"),
]

TORCH_INCLUDES = (*INCLUDES, f"-I{Path(torch.__file__).parent / 'include/torch/csrc/api/include'}")
CPUS = ("apple_m1", "apple_m2")  # without instructions for bf16, and with them


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("source", sorted(SOURCE_DIR.glob("*.cpp")), ids=lambda path: path.name)
def test_it_compiles(source: Path, cpu: str, tmp_path: Path) -> None:
    flags = (*FLAGS, "-fPIC", *TORCH_INCLUDES, f"-mcpu={cpu}")
    done = run_zig("c++", "aarch64-macos", *flags, "-c", str(source), "-o", str(tmp_path / "built.o"))
    assert done.returncode == 0, done.stderr
