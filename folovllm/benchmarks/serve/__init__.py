"""`folovllm bench serve`: what the users of a server feel, measured from outside, over HTTP.

Milestone: M8. vLLM counterpart: vllm/benchmarks/serve.py (`vllm bench serve`), whose option names and names of figures
are used. Left out: embeddings, images, LoRA, ramps of the rate. It works with every server that streams OpenAI's
`/v1/completions` or `/v1/chat/completions`.

    command   from arguments to files        options   the arguments, checked
    traffic   which requests, and when       load      sends them and stamps what comes back; nothing else
    answers   stamped bytes -> one Answer    metrics   answers -> TTFT, TPOT, ITL, goodput
    report    what a reader sees             plot      the distributions, and the run over time
"""
