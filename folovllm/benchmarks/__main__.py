"""`python -m folovllm.benchmarks`: the benchmark, and (with a hidden option) the process of one of its arms.

Milestone: M1. vLLM counterpart: none.
"""

import sys

from folovllm.benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main())
