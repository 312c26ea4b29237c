"""`folovllm`: the command line. Also `python -m folovllm`.

Milestone: M1. vLLM counterpart: vllm/entrypoints/cli. Left out: shell completion. A command is one function in
`commands/`, and one line at the end of this file. __main__.py starts it.
"""

import contextlib
import errno
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from folovllm import __version__
from folovllm.entrypoints.commands.bench import bench
from folovllm.entrypoints.commands.chat import chat
from folovllm.entrypoints.commands.demo import demo
from folovllm.entrypoints.commands.docs import docs_app
from folovllm.entrypoints.commands.generate import generate
from folovllm.entrypoints.commands.info import info
from folovllm.entrypoints.commands.learn import learn_app
from folovllm.entrypoints.commands.options import DebugOption
from folovllm.entrypoints.commands.pull import pull
from folovllm.entrypoints.commands.quantize import quantize
from folovllm.entrypoints.commands.quiz import quiz
from folovllm.entrypoints.commands.run_batch import run_batch
from folovllm.entrypoints.commands.serve import serve
from folovllm.entrypoints.commands.sim import sim
from folovllm.entrypoints.commands.trace import trace_app

EXIT_USER_ERROR = 2  # what typer itself uses for a wrong option
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class FriendlyGroup(TyperGroup):
    """All commands together. What a user can mend ends as one line on stderr, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except ValueError as error:  # FoloVLLM's own are ValueErrors that name the fix
            if ctx.find_root().meta.get("folovllm.debug"):
                traceback.print_exc()
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(EXIT_USER_ERROR) from None
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a pipe that is closed early is the business of typer
                raise
            _discard_output()
            typer.secho(f"error: {error.filename or 'the output'}: {error.strerror}", fg="red", err=True)
            raise typer.Exit(EXIT_USER_ERROR) from None


def _discard_output() -> None:
    """Sends stdout to nowhere, because Python would try to write the rest of its buffer once more at the exit."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=FriendlyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"folovllm {__version__}")
        raise typer.Exit


@app.callback()
def folovllm(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """FoloVLLM: vLLM rebuilt so that people can learn it, and a real engine while they do.

    [bold]Examples[/bold]

    \b
      folovllm demo                               compare with HuggingFace
      folovllm generate "The capital of France is"
      folovllm generate --json "One, two," "A, b," > answers.jsonl
      folovllm chat                               talk to the model
      folovllm chat -m ./my-model --preset m1     as of milestone M1
      folovllm chat --url http://localhost:8000   to the model of a server
      folovllm serve --port 8000                  for any client of the OpenAI API
      folovllm run-batch -i in.jsonl -o out.jsonl many requests from a file
      folovllm info smollm2-135m                  its shape, its KV cache
      folovllm learn                              write parts of the engine yourself
      folovllm docs run 03 2                      an example of a learning page
      folovllm trace view run.jsonl               look at what an engine did
      folovllm quiz m3                            interview questions on M3
      folovllm sim --gpu h100 --compare m1,m5     a machine that you do not have

    The default model is pulled once (93 MB). Every command explains itself: folovllm generate --help
    """


app.command()(generate)
app.command()(chat)
app.command()(demo)
app.command()(pull)
app.command()(quantize)
app.command()(info)
app.command()(quiz)
app.command()(sim)
app.add_typer(trace_app, name="trace")
app.add_typer(learn_app, name="learn")
app.add_typer(docs_app, name="docs")
# Everything after these belongs to a parser of their own, --help included.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=_PASS_ON, add_help_option=False)(bench)
app.command(context_settings=_PASS_ON, add_help_option=False)(serve)
app.command("run-batch", context_settings=_PASS_ON, add_help_option=False)(run_batch)


def main() -> None:
    """Reads the command line. The entry point is __main__.py."""
    sys.exit(app())
