"""`folovllm trace`: checks, compares and shows traces (milestone M2).

vLLM counterpart: none. The work is done in folovllm/trace, without torch.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from folovllm.trace import diff as trace_diff
from folovllm.trace import lint as trace_lint
from folovllm.trace import show as trace_show
from folovllm.trace.perfetto import to_perfetto
from folovllm.trace.record import read_trace
from folovllm.trace.view import render_view

EXIT_FOUND = 1  # violations, or a difference
MAX_SHOWN = 20

HELP = """Check, compare and look at traces (LLM(..., trace='file.jsonl')).

\b
  folovllm generate "The sky is" --trace run.jsonl   record every step
  folovllm trace view run.jsonl                      a page to step through
  folovllm trace show run.jsonl --step 7             one step, in the terminal
  folovllm trace lint run.jsonl                      are the rules kept?
  folovllm trace diff a.jsonl b.jsonl                where do two runs differ?
"""
trace_app = typer.Typer(no_args_is_help=True, help=HELP)

TraceFile = Annotated[Path, typer.Argument(metavar="FILE", help="A trace: what trace='file.jsonl' wrote.")]


@trace_app.command("lint")
def lint(file: TraceFile) -> None:
    """Check FILE against the rules of scheduling and paging. Exit code 1 if one is broken.

    \b
      folovllm trace lint run.jsonl
    """
    trace = read_trace(file)
    violations = trace_lint.lint(trace)
    for violation in violations[:MAX_SHOWN]:
        typer.echo(str(violation))
    if not violations:
        cut = "" if trace.end else " (not closed: what was still running at the end is not judged)"
        typer.echo(f"{len(trace.steps)} steps, {len(trace_lint.RULES)} rules: all kept{cut}")
        return
    if len(violations) > MAX_SHOWN:
        typer.echo(f"... and {len(violations) - MAX_SHOWN} more")
    for rule, count in Counter(violation.rule for violation in violations).most_common():
        typer.echo(f"{count:5} x {rule}: {trace_lint.RULES[rule]}")
    raise typer.Exit(EXIT_FOUND)


@trace_app.command("diff")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The trace to compare with it.")],
) -> None:
    """Name the first step in which traces A and B differ, times aside. Exit code 1 if there is one.

    \b
      folovllm trace diff reference.jsonl mine.jsonl
    """
    trace_a, trace_b = read_trace(a), read_trace(b)
    divergence = trace_diff.diff(trace_a, trace_b)
    if divergence is None:
        typer.echo(f"the same {len(trace_a.steps)} steps")
        return
    typer.echo(str(divergence))
    raise typer.Exit(EXIT_FOUND)


@trace_app.command("show")
def show(
    file: TraceFile,
    step: Annotated[int, typer.Option("--step", help="Which step; the first is 0.")] = 0,
) -> None:
    """Show one step of FILE: who computes what, who waits, and the blocks as a grid.

    \b
      folovllm trace show run.jsonl --step 7
    """
    typer.echo(trace_show.show(read_trace(file), step))


Out = Annotated[Path | None, typer.Option("-o", "--out", help="The file to write; the default is beside FILE.")]


@trace_app.command("view")
def view(
    file: TraceFile,
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="A second trace, shown beside the first.")
    ] = None,
    out: Out = None,
) -> None:
    """Make an HTML page of FILE to step through in a browser. With OTHER, the first divergence is marked.

    \b
      folovllm trace view run.jsonl
      folovllm trace view reference.jsonl mine.jsonl -o compared.html
    """
    files = [file] if other is None else [file, other]
    page = render_view([read_trace(path) for path in files], [path.name for path in files])
    _write(out or file.with_suffix(".html"), page, files)


@trace_app.command("perfetto")
def perfetto(file: TraceFile, out: Out = None) -> None:
    """Write FILE as Chrome trace events, to open at https://ui.perfetto.dev.

    \b
      folovllm trace perfetto run.jsonl
    """
    trace_events = json.dumps(to_perfetto(read_trace(file)), separators=(",", ":"))
    _write(out or file.with_suffix(".perfetto.json"), trace_events, [file])


def _write(path: Path, text: str, sources: list[Path]) -> None:
    if any(path.resolve() == source.resolve() for source in sources):
        raise ValueError(f"{path} is the trace itself; choose another file with -o")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another file with -o") from None
    typer.echo(f"wrote {path} ({len(text.encode()) / 1e6:.1f} MB)")
