"""Writing a folder of generated pages, or saying which of them are out of date.

Milestone: M0. vLLM counterpart: none. Imported by build_api.py and build_interview.py, which make the pages.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from page_symbols import ROOT

Pages = dict[Path, str]


def stale_pages(wanted: Pages, there: Iterable[Path]) -> list[Path]:
    """Returns the wanted pages whose file differs or is missing, and the files that are not wanted any more."""
    differing = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    return [*differing, *sorted(set(there) - set(wanted))]


def write_or_check(doc: str | None, make: Callable[[], Pages], stale_of: Callable[[Pages], list[Path]]) -> int:
    """The command line: writes what is stale, or with --check only names it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say which pages are out of date")
    check = parser.parse_args().check
    wanted = make()
    stale = stale_of(wanted)
    for path in stale if not check else ():
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    verb = "out of date" if check else "written"
    print("\n".join(f"{verb}: {path.relative_to(ROOT)}" for path in stale) or "all pages are up to date")
    return 1 if check and stale else 0
