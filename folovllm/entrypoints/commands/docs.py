"""`folovllm docs`: the learning pages, and their examples run from anywhere.

Milestone: M0. vLLM counterpart: none. The work is done in folovllm/learn/pages.py.
"""

import difflib
import re
import textwrap
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from folovllm.entrypoints.commands.learn_progress import pages_base
from folovllm.learn.pages import (
    Example,
    Page,
    counted,
    examples_of,
    find_page,
    load_pages,
    minutes,
    name_of,
    page_number,
    run_example,
)

EXIT_DIFFERENT = 1  # an example failed, or printed something else than the page shows


class DocsGroup(TyperGroup):
    """Reads `docs 03`, with the name of a page where a command should be, as `docs list 03`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if not args[0].startswith("-") and args[0] not in self.commands:
            find_page(args[0])  # raises ValueError with the pages there are
            args = ["list", *args]
        return super().resolve_command(ctx, args)


docs_app = typer.Typer(cls=DocsGroup, invoke_without_command=True)


@docs_app.callback()
def docs(ctx: typer.Context) -> None:
    """List the learning pages with their reading times, or run the examples of one.

    \b
      folovllm docs              the pages in reading order
      folovllm docs 03           the examples of page 03; also: docs list 03
      folovllm docs run 03 2     run its second example
      folovllm docs run 03       run them all
    """
    if ctx.invoked_subcommand is None:
        _list_pages()


def _list_pages() -> None:
    pages = load_pages()
    names = [name_of(page) for page in pages]
    width = max(map(len, names))
    for name, page in zip(names, pages, strict=True):
        text = page.text()
        count = len(examples_of(text))
        parts = [counted(sum(minutes(text)), "minute"), *([counted(count, "example")] if count else [])]
        title = page.title.removeprefix(f"{page.short} ")  # "01 Basic inference"
        typer.echo(f"{name:{width}}  {title} ({', '.join(parts)})")
    typer.echo(f"\nRead them in {pages_base()}docs/learn. The examples of one: folovllm docs list {names[1]}")


@docs_app.command("list")
def list_examples(
    page: Annotated[
        str | None, typer.Argument(metavar="[PAGE]", help="E.g. 03, m3, or 03_paged_kv_cache; default: list the pages.")
    ] = None,
) -> None:
    """List the examples of a page."""
    if page is None:
        _list_pages()
        return
    chosen = find_page(page)
    typer.echo(f"{chosen.title}: {pages_base()}docs/{chosen.file}")
    for example in _examples(chosen):
        typer.echo(f"{example.number:3}  line {example.line:3}  {example.title}")
    typer.echo(f"\nRun one: folovllm docs run {name_of(chosen)} 1")
    for other in load_pages():
        if other.short == chosen.short and name_of(other) != name_of(chosen) == page_number(page):
            typer.echo(f"Another page has this number: folovllm docs list {name_of(other)}")


@docs_app.command("run", context_settings={"ignore_unknown_options": True})  # -1 is a wrong number, not an option
def run(
    page: Annotated[str, typer.Argument(metavar="PAGE", help="E.g. 03, m3, 04b, or 03_paged_kv_cache.")],
    number: Annotated[str | None, typer.Argument(metavar="[K]", help="Which example; default: all.")] = None,
) -> None:
    """Run examples of a page, and say whether they print what the page shows. Exit code 1 if they do not."""
    chosen = find_page(page)
    examples = _examples(chosen)
    wanted = examples if number is None else [_numbered(examples, number, chosen)]
    results = [_run(chosen, example) for example in wanted]
    if len(results) > 1:
        typer.echo(f"{sum(results)} of {len(results)} examples print what the page shows.")
    if not all(results):
        raise typer.Exit(EXIT_DIFFERENT)


def _examples(page: Page) -> list[Example]:
    """Raises ValueError if the page has none."""
    examples = examples_of(page.text())
    if not examples:
        with_some = [name_of(other) for other in load_pages() if examples_of(other.text())]
        raise ValueError(f"page {name_of(page)} has no examples; these have some: {', '.join(with_some)}")
    return examples


def _numbered(examples: list[Example], number: str, page: Page) -> Example:
    """Raises ValueError for anything but the number of an example."""
    found = next((example for example in examples if re.fullmatch(f"0*{example.number}", number)), None)
    if found is None:
        raise ValueError(f"page {name_of(page)} has examples 1 to {len(examples)}, not {number}")
    return found


def _run(page: Page, example: Example) -> bool:
    """Shows the code and what it prints. Returns whether that is what the page shows."""
    typer.secho(f"# {page.title}, example {example.number} (docs/{page.file}, line {example.line})", bold=True)
    typer.echo(example.code)
    try:
        printed = run_example(example, page.file)
    except Exception as error:  # any error of the example is its result
        typer.secho(_traceback(error, page), fg="red")
        return False
    typer.echo(textwrap.indent(printed, "  "))
    verdict, same = _verdict(example, printed)
    typer.secho(verdict + "\n", fg="green" if same else "red")
    return same


def _traceback(error: Exception, page: Page) -> str:
    """The traceback from the example on, without the frames of this program."""
    frames = error.__traceback__
    while frames and not frames.tb_frame.f_code.co_filename.startswith(page.file):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _verdict(example: Example, printed: str) -> tuple[str, bool]:
    if example.output is None:
        return "The page shows no output to compare with.", True
    if example.output == printed:
        return "This is what the page shows.", True
    shown, now = example.output.splitlines(), printed.splitlines()
    lines = difflib.unified_diff(shown, now, "on the page", "printed now", lineterm="")
    return "The page shows something else:\n" + "\n".join(lines), False
