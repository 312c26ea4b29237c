#!/usr/bin/env python3
"""Measure FoloVLLM beside vLLM, llama.cpp, OpenVINO and HuggingFace: `python scripts/compare_peers.py --help`.

Milestone: M4. vLLM counterpart: none. The code is scripts/peers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for scripts.peers

from scripts.peers.command import main

if __name__ == "__main__":
    sys.exit(main())
