"""The benchmark: every milestone of the ladder beside HuggingFace, on the same requests, in the same run.

Milestone: M1 (the arms m2, m3, ... join as their rungs are built). vLLM counterpart: vllm/benchmarks. Left out: the
serving benchmark (it needs a server) and arrivals by the clock.

    command   from arguments to files             options       the arguments, checked
    task      what one process is asked to do     workloads     which requests it sends, by name
    requests  requests, and when they are sent    scenarios     those of M5 and M6
    runner    one fresh process per arm           child         that process: measures, writes JSON
    engine_arm, hf_arm  who answers               measure       time stamps and counters -> figures
    probe     memory bandwidth                    machine       where it ran
    shapes    public models' configs              random_weights  a checkpoint in such a shape
    summary   medians, ratios, token equality     groups, ablation  by kind of request, by rung
    report, tables, plot, plot_groups  what a reader sees
    peers     other engines beside ours (scripts/compare_peers.py)
"""

from folovllm.benchmarks.command import main

__all__ = ["main"]
