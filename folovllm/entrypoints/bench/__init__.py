"""The benchmark: every milestone of the ladder beside HuggingFace, on the same requests, in the same run.

Milestone: M1 (the arms m2, m3, ... join as their rungs are built). vLLM counterpart: vllm/benchmarks. Left out: arrival
rates and the serving benchmark (they need a server).

    command   from arguments to files             options       the arguments, checked
    task      what one process is asked to do     workloads     which requests it sends
    runner    one fresh process per arm           child         that process: measures, writes JSON
    engine_arm, hf_arm  who answers               measure       time stamps and counters -> figures
    probe     memory bandwidth                    machine       where it ran
    summary   medians, ratios, token equality     report, plot  what a reader sees
"""

from folovllm.entrypoints.bench.command import main

__all__ = ["main"]
