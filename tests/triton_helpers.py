"""What NVIDIA's tools say of a compiled Triton kernel, for the tests of M4's and M7's kernels."""

import re
import subprocess
from pathlib import Path


def spilled(cubin: bytes, folder: Path) -> int:
    """Bytes of memory per thread that stand in for registers, as NVIDIA's own tool (in Triton's wheel) reports them."""
    import triton

    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.check_output([tool, "--dump-resource-usage", folder / "kernel.cubin"], text=True)
    return sum(map(int, re.findall(r"STACK:(\d+)", report)))
