"""`folovllm bench`: the performance comparison, from the installed command (milestone M1).

vLLM counterpart: vllm/entrypoints/cli/benchmark/main.py. The measuring is folovllm/benchmarks, which
scripts/compare_perf.py and `make bench` run too.
"""

import typer


def bench(ctx: typer.Context) -> None:
    """Measure FoloVLLM beside HuggingFace: folovllm bench --help lists the options."""
    from folovllm.benchmarks.command import main

    code = main(list(ctx.args))
    if code:
        raise typer.Exit(code)
