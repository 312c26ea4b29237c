#!/usr/bin/env python3
"""Measure `folovllm serve` beside vLLM's and llama.cpp's servers: `python scripts/compare_servers.py --help`.

Milestone: M8. vLLM counterpart: none. The code is scripts/peers: servers.py, server_command.py, server_report.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for scripts.peers

from scripts.peers.server_command import main

if __name__ == "__main__":
    sys.exit(main())
