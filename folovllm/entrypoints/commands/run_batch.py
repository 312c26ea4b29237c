"""`folovllm run-batch`: answers the requests of a file, in this process or at a server, into another file.

Milestone: M8. vLLM counterpart: vllm/entrypoints/cli/run_batch.py. Left out: files at URLs, uploading the output.

folovllm/entrypoints/openai/batch.py has the format.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer
from tqdm import tqdm

from folovllm.entrypoints.commands.options import without_debug
from folovllm.entrypoints.commands.serve_options import Parser, ServeCommand, parse_command
from folovllm.text_files import read_stdin, read_text_file, split_lines

if TYPE_CHECKING:
    from folovllm.entrypoints.openai.batch import BatchItem, Summary

DESCRIPTION = """\
Answer the requests of a file, one JSON object per line, as OpenAI's batch API does.

  folovllm run-batch -i requests.jsonl -o answers.jsonl
  folovllm run-batch -i requests.jsonl -o answers.jsonl --model ./my-model --max-num-seqs 16
  folovllm run-batch -i requests.jsonl -o answers.jsonl --url http://127.0.0.1:8000

A line is {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello"}}; the other url is
/v1/chat/completions. Every line gets one line of the output, which is written as soon as its answer is there; the order
is that of the answers, and custom_id tells which is which. Ctrl-C keeps what has been written.
"""
EPILOG = "All other options are those of the engine: see folovllm serve --help. With --url there are none."
STDIO = "-"
EXIT_DIED = 1
# Options of `folovllm serve` that a batch has a use for; the others are about the socket.
_USED = ("chat_template", "disable_frontend_multiprocessing")


def run_batch(ctx: typer.Context) -> None:
    """Answer the requests of a file (OpenAI's batch format): folovllm run-batch --help lists the options."""
    given, engine_argv = make_parser().parse_known_args(without_debug(ctx))
    command = parse_engine(given, engine_argv)
    items = read_items(given.input_file)
    check_output(given.input_file, given.output_file)
    from folovllm.engine.async_llm import EngineDeadError
    from folovllm.entrypoints.openai.batch import Summary

    summary = Summary(len(items))
    try:
        asyncio.run(_run(given, command, items, summary))
    except EngineDeadError as error:
        typer.secho(f"error: the engine has died: {error}", fg="red", err=True)
        raise typer.Exit(EXIT_DIED) from None
    finally:
        _report(summary, given.output_file)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="folovllm run-batch",
        usage="folovllm run-batch -i FILE -o FILE [OPTIONS]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="the requests; - is stdin")
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="the answers; - is stdout")
    parser.add_argument("--url", metavar="URL", help="ask this server (any OpenAI API), and start no engine")
    parser.add_argument("--api-key", metavar="KEY", help="the key of the server at --url")
    parser.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="requests at a time (default: twice max_num_seqs, at a server 64)",
    )
    return parser


def parse_engine(given: argparse.Namespace, argv: Sequence[str]) -> ServeCommand | None:
    """The options of the engine, checked before anything is read or loaded; None with --url."""
    if given.max_concurrency is not None and given.max_concurrency < 1:
        raise ValueError(f"--max-concurrency must be at least 1, got {given.max_concurrency}")
    if given.url is not None:
        if argv:
            raise ValueError(f"--url asks a server that has an engine already: leave {argv[0]} out")
        return None
    if given.api_key is not None:
        raise ValueError("--api-key is for a server: name it with --url")
    command = parse_command(argv)
    default = type(command.options)()
    for name, value in vars(command.options).items():
        if name not in _USED and value != getattr(default, name):
            raise ValueError(f"--{name.replace('_', '-')} is for folovllm serve: a batch opens no port; leave it out")
    return command


def read_items(path: str) -> "list[BatchItem]":
    """The requests of the input file. Raises ValueError if it cannot be read, or holds none."""
    try:
        text = read_stdin() if path == STDIO else read_text_file(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; -i takes a file on this machine") from None
    from folovllm.entrypoints.openai.batch import read_batch

    items = read_batch(split_lines(text))
    if not items:
        raise ValueError(f"{path} holds no requests: every line is a JSON object; see folovllm run-batch --help")
    return items


def check_output(input_file: str, output_file: str) -> None:
    """Raises ValueError if the answers would overwrite the requests, under whatever name."""
    if STDIO in (input_file, output_file):
        return
    source, target = Path(input_file).expanduser(), Path(output_file).expanduser()
    if target.exists() and target.samefile(source):
        raise ValueError(f"{output_file} is the input file; choose another one with -o")


async def _run(
    given: argparse.Namespace, command: ServeCommand | None, items: "list[BatchItem]", summary: "Summary"
) -> None:
    """Opens the output before the model is loaded, and asks the server or the engine."""
    from folovllm.entrypoints.openai.batch import answer_all
    from folovllm.entrypoints.openai.senders import engine_here, server_at

    with contextlib.closing(Output(given.output_file)) as output:
        sender = server_at(given.url, given.api_key) if command is None else engine_here(command)
        async with sender as (send, num_at_once):
            output.begin()
            bar = tqdm(total=len(items), unit="request", desc="Running batch", disable=not sys.stderr.isatty())
            with bar:
                await answer_all(items, send, output.write, given.max_concurrency or num_at_once, summary, bar.update)


class Output:
    """The file of the answers. It is opened before the model is loaded, and emptied when the first request can run."""

    def __init__(self, path: str) -> None:
        self._file: TextIO | None = None
        if path != STDIO:
            try:
                self._file = Path(path).expanduser().open("a", encoding="utf-8", newline="\n")
            except OSError as error:
                raise ValueError(f"cannot write {path}: {error.strerror}; choose another file with -o") from None

    def begin(self) -> None:
        if self._file is not None and self._file.seekable():
            self._file.truncate(0)

    def write(self, line: str) -> None:
        """Writes a line and flushes it: it survives whatever happens to this process next."""
        file = self._file or sys.stdout
        file.write(line + "\n")
        file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _report(summary: "Summary", path: str) -> None:
    where = "stdout" if path == STDIO else path
    failed = f", {summary.num_failed} of them with an error" if summary.num_failed else ""
    typer.secho(f"{summary.num_answered} of {summary.num_items} answered{failed}: {where}", dim=True, err=True)
