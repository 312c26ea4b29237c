#!/usr/bin/env python3
"""Measure FoloVLLM beside vLLM, llama.cpp, OpenVINO and HuggingFace: `python scripts/compare_peers.py --help`.

Milestone: M4. vLLM counterpart: none. The code is folovllm/entrypoints/bench/peers.
"""

import sys

from folovllm.entrypoints.bench.peers import main

if __name__ == "__main__":
    sys.exit(main())
