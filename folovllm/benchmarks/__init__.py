"""The benchmark: every milestone of the ladder beside HuggingFace, on the same requests, in the same run.

Milestone: M1 (the arms m2, m3, ... join as their rungs are built). vLLM counterpart: vllm/benchmarks. Left out: the
serving benchmark (it needs a server) and arrivals by the clock. Other engines are in scripts/peers, on the same runner.

    command       from arguments to files            options      the arguments, checked
    workloads     which requests, and when           arms         the engines to compare, and driving ours
    hf_arm        HuggingFace as an arm              runner       one fresh process per arm; guard ends it with us
    metrics       time stamps -> figures             machine      where it ran, and how fast its memory is
    report, plot  what a reader sees                 random_model weights in the shape of a public model
"""
