#!/usr/bin/env python3
"""Write the generated parts of the front pages: README.md, docs/README.md and the pages beside it.

Milestone: M0. vLLM counterpart: none. A page has `<!-- front: NAME -->` `<!-- /front -->` where the block NAME belongs;
BLOCKS names them all. A ```console block on a page of SESSIONS shows commands with what they print (front_shell.py).

    python scripts/dev/write_front_pages.py               rewrite the blocks
    python scripts/dev/write_front_pages.py --sessions    also run the commands of the console blocks (needs the model)
    python scripts/dev/write_front_pages.py --check       change nothing; exit code 1 if a page is out of date
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import front_files
import front_index
import front_plan
import front_reference
import front_results
import front_serving
from front_shell import with_sessions

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- front: (?P<name>[\w-]+) -->\n).*?(<!-- /front -->)", re.DOTALL)
SESSIONS = ("README.md", "docs/getting_started.md")
# Each takes the page's folder, for relative links, and returns Markdown that ends in a newline.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "newcomer": front_index.newcomer,
    "developer": front_index.developer,
    "interview": front_index.interview,
    "milestones": front_index.milestones,
    "guides": front_index.guides,
    "topics": front_index.topics,
    "statistics": front_index.statistics,
    "engine-arguments": front_reference.engine_arguments,
    "sampling-parameters": front_reference.sampling_parameters,
    "commands": front_reference.commands,
    "targets": front_reference.targets,
    "parts": front_reference.parts,
    "server-options": front_serving.server_options,
    "server-refusals": front_serving.server_refusals,
    "server-metrics": front_serving.server_metrics,
    "files": front_files.files,
    "rows": front_files.rows,
    "roadmap": front_plan.roadmap,
    "checklist": front_plan.checklist,
    "size": front_plan.size,
    "proven": front_results.proven,
    "tuning": front_results.tuning,
    "paging": front_results.paging,
    "peers": front_results.peers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say which pages are out of date")
    parser.add_argument("--sessions", action="store_true", help="run the commands of the console blocks")
    args = parser.parse_args()
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(ROOT).as_posix()
        written = with_blocks(text, page.parent)
        if args.sessions and name in SESSIONS:
            written = with_sessions(written)
        if written != text:
            stale.append(f"{'out of date' if args.check else 'rewritten'}: {name}")
            if not args.check:
                page.write_text(written, encoding="utf-8")
    print("\n".join(stale) or "all pages are up to date")
    return 1 if args.check and stale else 0


def pages() -> Iterator[Path]:
    """The pages that have a block or sessions."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if BLOCK.search(page.read_text(encoding="utf-8")):
            yield page


def with_blocks(text: str, folder: Path) -> str:
    """`text` of a page in `folder` with every block as it is now. Raises ValueError for an unknown block."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise ValueError(f"unknown block {match['name']!r}; there are {', '.join(BLOCKS)}")
        return match[1] + BLOCKS[match["name"]](folder) + match[3]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    sys.exit(main())
