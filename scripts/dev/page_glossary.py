"""The glossary: docs/data/glossary.toml as the page docs/glossary.md, and links to it from the learning pages.

Milestone: M0. vLLM counterpart: none. An entry of the file:

    [block-table]
    term = "block table"
    also = ["block tables"]            # other forms that are linked; a plural with "s" needs none
    page = "learn/03_paged_kv_cache.md"  # where it is explained; left out if only the entry itself says it
    text = "One or two sentences."
    ours = false                       # true: a word of this project
    link = true                        # false: an everyday word, of which only the forms of `also` are linked
    not_on = ["07_gptq_quantization"]  # pages on which the word means something else
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from page_links import CITATION, CODE, COMMENTS, LINKS, rewrite
from page_symbols import ROOT

from folovllm.learn.pages import load_pages

GLOSSARY = ROOT / "docs/data/glossary.toml"
HEADINGS_AND_TABLES = r"^## References\n.*?(?=^## |\Z)|^#+ [^\n]*$|^[^\S\n]*\|[^\n]*$"
OLD_LINK = re.compile(r"\[([^\[\]]+)\]\((?:\.\./)*glossary\.md#[\w-]+\)")

INTRODUCTION = """\
# Glossary

The words of these pages: first the words of the field, then those that this project uses in a meaning of its own. The
learning pages link the first use of each word to its entry here. `scripts/dev/build_docs.py` writes this page from
[data/glossary.toml](data/glossary.toml).
"""


@dataclass(frozen=True)
class Term:
    id: str
    term: str
    text: str
    page: str = ""
    also: tuple[str, ...] = ()
    ours: bool = False
    link: bool = True
    not_on: tuple[str, ...] = ()

    @property
    def forms(self) -> list[str]:
        return [self.term, *self.also]


@cache
def load_terms() -> tuple[Term, ...]:
    """The entries of the file. Raises ValueError for an unknown or missing key, and for an id that its term has not."""
    terms = []
    for id_, entry in tomllib.loads(GLOSSARY.read_text(encoding="utf-8")).items():
        try:
            term = Term(
                id_, **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
            )
        except TypeError as error:
            raise ValueError(f"{GLOSSARY.name}, [{id_}]: {error}") from None
        if id_ != (slug := re.sub(r"[^\w-]", "", term.term.lower().replace(" ", "-"))):
            raise ValueError(f"{GLOSSARY.name}: the entry of {term.term!r} must be called [{slug}], not [{id_}]")
        terms.append(term)
    return tuple(terms)


def link_terms(text: str, terms: Iterable[Term], target: str) -> str:
    """`text` with the first use of each term linked to `target`#id. Links of an earlier run are taken out first."""
    text = OLD_LINK.sub(r"\1", text)
    by_form = {form: term for term in terms for form in term.forms}
    if not by_form:
        return text
    pattern = "|".join(_pattern(form) for form in sorted(by_form, key=len, reverse=True))
    lower = {form.lower(): term for form, term in by_form.items()}
    seen: set[str] = set()

    def link(match: re.Match[str]) -> str:
        word = match["word"]
        form = word.lower().replace("\n", " ")
        form = form if form in lower else form.removesuffix("s")
        term = lower[form]
        if term.id in seen or (form == term.term.lower() and not term.link):
            return word
        seen.add(term.id)
        return f"[{word}]({target}#{term.id})"

    closed = f"{COMMENTS}|{CODE}|{LINKS}|{CITATION}|{HEADINGS_AND_TABLES}"
    return rewrite(text, rf"(?<![\w-])(?P<word>{pattern})(?![\w-])", link, closed)


def _pattern(form: str) -> str:
    """A small first letter matches a capital, too, but "ITL" only itself. A line may break between two words."""
    words = re.escape(form).replace(r"\ ", r"[ \n]")
    return words + "s?" if any(c.isupper() for c in form) else f"[{form[0]}{form[0].upper()}]{words[1:]}s?"


def glossary_page() -> str:
    terms = sorted(load_terms(), key=lambda term: term.term.lower())
    lines = [INTRODUCTION]
    for title, ours in (("Words of the field", False), ("Words of this project", True)):
        shown = [term for term in terms if term.ours == ours]
        first_of = {term.term[0].upper(): term.id for term in reversed(shown)}
        letters = " · ".join(f"[{letter}](#{first_of[letter]})" for letter in sorted(first_of))
        lines += [f"## {title}", "", letters]
        for term in shown:
            lines += ["", *_entry(term)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _entry(term: Term) -> list[str]:
    others = [other for other in load_terms() if other.id != term.id]
    titles = {page.file: page.title for page in load_pages()}
    where = f" Explained in [{titles[term.page]}]({term.page})." if term.page in titles else ""
    return [f"### {term.term}", "", link_terms(term.text, others, "") + where]
