"""`folovllm bench`: the performance comparison, and `folovllm bench serve`: a server under load.

Milestone: M1; `serve` came with M8. vLLM counterpart: vllm/entrypoints/cli/benchmark/main.py. The measuring is
folovllm/benchmarks, which scripts/compare_perf.py and `make bench` run too.
"""

import typer


def bench(ctx: typer.Context) -> None:
    """Measure FoloVLLM beside HuggingFace, or a server: folovllm bench --help, folovllm bench serve --help."""
    if ctx.args[:1] == ["serve"]:
        from folovllm.benchmarks.serve.command import main as measure_server

        code = measure_server(ctx.args[1:])
    else:
        from folovllm.benchmarks.command import main

        code = main(list(ctx.args))
    if code:
        raise typer.Exit(code)
