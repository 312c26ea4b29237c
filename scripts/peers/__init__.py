"""The peers: FoloVLLM beside HuggingFace, vLLM's CPU build, llama.cpp and OpenVINO GenAI, in one run.

Milestone: M4. vLLM counterpart: none (its benchmarks compare it with itself). Left out: GPUs, servers, other workloads
than those of the benchmark next door.

    command       from arguments to files              options    the arguments, checked
    catalog       the peers, as data                   environment  a virtual environment for each
    weights       the files that a peer reads          tasks      what one process is asked, and asking it
    pairs         who runs when                        process, guard  children that never outlive us
    adapters/     stand-alone files that run in a peer's own environment
    summary       medians of ratios                    report, plot  what a reader sees
"""

from scripts.peers.command import main

__all__ = ["main"]
