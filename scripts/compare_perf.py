#!/usr/bin/env python3
"""Measure the milestones beside HuggingFace: `python scripts/compare_perf.py --help`.

Milestone: M1. vLLM counterpart: vllm/benchmarks. The benchmark itself is folovllm/benchmarks, which
`folovllm bench` runs too.
"""

import sys

from folovllm.benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main())
