"""`folovllm serve`: the server, from its command line to its exit status.

Milestone: M8. vLLM counterpart: vllm/entrypoints/cli/serve.py.
"""

import importlib.util

import typer

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "aiohttp")  # the extra `serve`


def serve(ctx: typer.Context) -> None:
    """Serve a model over HTTP, for any client of the OpenAI API."""
    from folovllm.entrypoints.commands.options import without_debug
    from folovllm.entrypoints.commands.serve_options import parse_command

    command = parse_command(without_debug(ctx))
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"the server needs {', '.join(missing)}: pip install 'folovllm[serve]'")
    from folovllm.entrypoints.openai.lifecycle import serve as run

    if status := run(command):
        raise typer.Exit(status)
