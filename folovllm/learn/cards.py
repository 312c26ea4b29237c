"""Flash cards: the interview questions as an Anki package, or as a file of tab-separated values.

Milestone: M0. vLLM counterpart: none.

A card's id follows from its question's id, so that a second import updates the cards and keeps what Anki knows about
them. A question with variables becomes a card with its first values; `folovllm quiz` draws new ones.
"""

import csv
import hashlib
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from folovllm.learn.questions import Question

_MODEL_ID = 1_607_392_319  # arbitrary, and never to change: Anki knows the note type by it
_CSS = ".card { font-family: sans-serif; font-size: 18px; text-align: left; } .trap { color: #a33; }"


def front(question: Question, lang: str) -> str:
    return _html(question.text(question.q, question.first_values(), lang))


def back(question: Question, lang: str) -> str:
    """The short answer, the rubric and the trap, as HTML."""
    values = question.first_values()
    points = (f"<li>{_html(question.text(point.text, values, lang))}</li>" for point in question.points)
    trap = _html(question.text(question.trap, values, lang))
    return f'{_html(question.text(question.say30, values, lang))}<ul>{"".join(points)}</ul><p class="trap">{trap}</p>'


def _html(text: str) -> str:
    return "<br><br>".join(html.escape(" ".join(paragraph.split())) for paragraph in text.split("\n\n"))


def tags(question: Question) -> list[str]:
    return [question.chapter, question.kind, question.level, *question.tags]


def deck_name(question: Question) -> str:
    return f"FoloVLLM::{question.chapter}"


def write_tsv(questions: Iterable[Question], file: Path, lang: str) -> None:
    """Writes a text file that Anki imports: its first lines say which column is what."""
    with file.open("w", encoding="utf-8", newline="") as out:
        out.write("#separator:tab\n#html:true\n#guid column:1\n#deck column:2\n#tags column:5\n")
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        for q in questions:
            writer.writerow([f"folovllm-{q.id}", deck_name(q), front(q, lang), back(q, lang), " ".join(tags(q))])


def write_anki(questions: Iterable[Question], file: Path, lang: str) -> None:
    """Writes an Anki package with a deck per chapter. Raises ValueError if genanki is not installed."""
    try:
        import genanki
    except ImportError:
        raise ValueError(
            "an Anki package needs genanki: pip install 'folovllm[interview]', or write --tsv FILE, which needs nothing"
        ) from None
    model = genanki.Model(
        _MODEL_ID,
        "FoloVLLM question",
        fields=[{"name": "Question"}, {"name": "Answer"}, {"name": "Id"}],
        templates=[{"name": "Card", "qfmt": "{{Question}}", "afmt": "{{FrontSide}}<hr id=answer>{{Answer}}"}],
        css=_CSS,
    )
    decks: dict[str, Any] = {}
    for q in questions:
        name = deck_name(q)
        deck = decks.setdefault(name, genanki.Deck(stable_id(name), name))
        fields = [front(q, lang), back(q, lang), q.id]
        deck.add_note(genanki.Note(model, fields, guid=genanki.guid_for("folovllm", q.id), tags=tags(q)))
    genanki.Package(list(decks.values())).write_to_file(file)


def stable_id(name: str) -> int:
    """Returns a number of 31 bits that is the same in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") & 0x7FFFFFFF
