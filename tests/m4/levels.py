"""The fixtures `isa` and `ops`: the C++ operators, once per level of the library that this machine has.

Milestone: M4. A test that takes `ops` runs for every level, because each level compiles other code: vectors of another
width, other instructions, other branches of the preprocessor. A test of the engine takes `isa`, for cpu_isa=isa.
The tests of "avx512", which leaves out bf16 and VNNI, are marked `slow`: its library takes another minute to build.

`python -m tests.m4.levels` builds the libraries, so that no test waits for a compiler.
"""

import sys
from typing import Any

import pytest

from folovllm.csrc.build import BuildError, build, default_cache_dir, load_ops
from folovllm.csrc.levels import levels_here

SLOW = ("avx512",)
LEVELS = levels_here()
TESTED = [isa for isa in LEVELS if isa not in SLOW]


@pytest.fixture(scope="session", params=[pytest.param(i, marks=[pytest.mark.slow] * (i in SLOW)) for i in LEVELS])
def isa(request: pytest.FixtureRequest) -> str:
    """A level that this CPU can run, and a compiler can build."""
    level: str = request.param
    if load_ops(level) is None:
        pytest.skip("no C++ kernels on this machine")
    return level


@pytest.fixture(scope="session")
def ops(isa: str) -> Any:
    """The operators of `isa`, as torch.ops.folovllm_avx2."""
    return load_ops(isa)


def main() -> int:
    try:
        for level in TESTED:
            build(default_cache_dir(), isa=level)
    except (BuildError, OSError) as error:
        print(f"the tests run without the C++ kernels: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
