#!/usr/bin/env python3
"""Fill the pages in place: links to code with lines, included code, head and foot, glossary links, outputs of examples.

Milestone: M0. vLLM counterpart: none. GitHub shows what is committed, so what a page needs is written into the page. A
second run changes nothing. What is written on a page by hand: page_links.py (citations), page_code.py (code),
page_nav.py (head and foot), page_glossary.py (terms), folovllm/learn/pages.py (examples).

    python scripts/dev/build_docs.py                 fill all pages
    python scripts/dev/build_docs.py 03 04b          only pages whose file name contains one of these
    python scripts/dev/build_docs.py --examples 03   also run the examples, and write what they print
    python scripts/dev/build_docs.py --check         change nothing; exit code 1 if a page is out of date
    python scripts/dev/build_docs.py --vllm-source FOLDER    read the lines of the cited vLLM symbols from its wheel:
                                                             pip download vllm==0.11.0 --no-deps, then unzip it
"""

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

from page_code import fill_code
from page_glossary import glossary_page, link_terms, load_terms
from page_links import Links
from page_nav import fill_nav
from page_symbols import PIN, ROOT, VLLM_SYMBOLS, lines_of_symbol, vllm_symbols

from folovllm.learn.pages import with_outputs

DOCS = ROOT / "docs"
PAGES = ("README.md", "docs/**/*.md", "milestones/**/*.md")
SOURCES = ("docs/**/*.md", "milestones/**/*.md", "milestones/**/*.toml")  # what may cite vLLM


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a page's file name; default: all pages")
    parser.add_argument("--check", action="store_true", help="change nothing; say which pages are out of date")
    parser.add_argument("--examples", action="store_true", help="run the examples and write their outputs")
    parser.add_argument("--vllm-source", type=Path, metavar="FOLDER", help="the unpacked wheel, with vllm/ in it")
    args = parser.parse_args()
    if args.vllm_source:
        print(write_vllm_symbols(args.vllm_source))
    stale, problems = [], []
    for page in chosen_pages(args.names):
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        built, wrong = build_page(text, page, args.examples)
        name = page.relative_to(ROOT).as_posix()
        problems += [f"{name}:{line}: {message}" for line, message in wrong]
        if built != text:
            stale.append(f"{'out of date' if args.check else 'rewritten'}: {name}")
            if not args.check:
                page.write_text(built, encoding="utf-8")
    print("\n".join([*stale, *problems]) or "all pages are up to date")
    return 1 if problems or (args.check and stale) else 0


def chosen_pages(names: list[str]) -> list[Path]:
    """Raises SystemExit for a name that no page has."""
    pages = sorted({*(page for pattern in PAGES for page in ROOT.glob(pattern)), DOCS / "glossary.md"})
    unknown = [name for name in names if not any(name in page.name for page in pages)]
    if unknown:
        sys.exit(f"no page's file name contains {', '.join(unknown)}")
    return [page for page in pages if not names or any(name in page.name for name in names)]


def build_page(text: str, page: Path, examples: bool = False) -> tuple[str, list[tuple[int, str]]]:
    """The page as it should be, and (line, what is wrong) for what could not be written."""
    if page == DOCS / "glossary.md":
        text = glossary_page()
    text, failed = with_outputs(text, page.name) if examples else (text, [])
    links = Links(page.parent)
    built = links.written(text)
    if page.parent == DOCS / "learn":
        built = link_terms(built, [t for t in load_terms() if page.stem not in t.not_on], "../glossary.md")
    built, wrong = fill_code(built, page.parent)
    return fill_nav(built, page), sorted(failed + links.problems + wrong)


# ---- the lines of vLLM's symbols


def write_vllm_symbols(folder: Path) -> str:
    """Looks every cited symbol up in the unpacked wheel. Raises SystemExit if one is not there."""
    lines, missing, cited = {}, [], cited_vllm()
    for anchor in sorted(cited | mentioned_vllm()):
        path, _, symbol = anchor.partition("#")
        try:
            if not (folder / path).is_file():
                raise ValueError(f"there is no {path}")
            lines[anchor] = lines_of_symbol(folder / path, symbol)[0] if symbol else 1
        except ValueError as error:
            missing += [f"{anchor}: {error}"] if anchor in cited else []
    if missing:
        sys.exit(f"vLLM {PIN} does not have\n  " + "\n  ".join(missing))
    content = {"release": PIN, "source": f"the wheel vllm=={PIN[1:]} of the package index", "lines": lines}
    VLLM_SYMBOLS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    vllm_symbols.cache_clear()
    return f"{VLLM_SYMBOLS.relative_to(ROOT)}: {len(lines)} symbols"


def cited_vllm() -> set[str]:
    """Everything of vLLM that a page, a question or the manifest cites, as `vllm/path.py#Symbol` or `vllm/path.py`."""
    texts = [path.read_text(encoding="utf-8") for pattern in SOURCES for path in ROOT.glob(pattern)]
    found = {match for text in texts for match in re.findall(rf"vllm@{PIN}:(vllm/[\w/.]+\.py(?:#[\w.]*\w)?)", text)}
    manifest = tomllib.loads((ROOT / "milestones/manifest.toml").read_text(encoding="utf-8"))
    return found | {symbol for entry in manifest.values() for symbol in entry["vllm"]}


def mentioned_vllm() -> set[str]:
    """The files that docstrings name as counterparts, some of them files of another release of vLLM."""
    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("folovllm/**/*.py"))
    return {match for text in texts for match in re.findall(r"(?<![\w/`:@])vllm/[\w/]+\.py(?:#[\w.]*\w)?", text)}


if __name__ == "__main__":
    sys.exit(main())
