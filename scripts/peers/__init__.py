"""The peers: FoloVLLM beside HuggingFace, vLLM's CPU build, llama.cpp and OpenVINO GenAI, in one run.

Milestone: M4. vLLM counterpart: none (its benchmarks compare it with itself). On the runner, options and figures of
folovllm/benchmarks. Left out: GPUs, and workloads other than A and smoke. The servers came with M8.

    command      from arguments to files                 options      the arguments, checked
    catalog      the peers, as data                      environment  a virtual environment for each
    weights      the files that a peer reads             bench        one measurement of one engine
    comparison   pairs in turn, medians of ratios        report, plot what a reader sees
    servers, server_command, server_report   the same for servers (scripts/compare_servers.py)
    adapters/    stand-alone files that run in a peer's own environment
"""
