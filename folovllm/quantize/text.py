"""Calibration and evaluation text that needs no download: the help topics of Python itself.

Milestone: M7. vLLM counterpart: none. GPTQ papers use C4 and WikiText-2, and both need a network.

`pydoc_data.topics` holds chapters of the language reference, several of them twice, one inside another. Repeated
paragraphs are dropped, and then the topics are dealt out in turn, so that no paragraph is in both halves.
"""

import hashlib
from pathlib import Path

BUILTIN = "builtin"
HF_PREFIX = "hf:"
SPLITS = ("calibration", "evaluation")


def builtin_text(split: str) -> str:
    """Returns one half of the built-in text. It differs between Python versions, so results name it by
    `text_digest`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    from pydoc_data.topics import topics  # 0.7 MB, so only when it is asked for

    seen: set[str] = set()
    halves: dict[str, list[str]] = {name: [] for name in SPLITS}
    for number, topic in enumerate(sorted(topics)):
        halves[SPLITS[number % 2]] += _new_paragraphs(topics[topic], seen)
    return "\n\n".join(halves[split])


def _new_paragraphs(text: str, seen: set[str]) -> list[str]:
    fresh = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())  # the same text may be wrapped or indented differently elsewhere
        if words and words not in seen:
            seen.add(words)
            fresh.append(paragraph.strip("\n"))
    return fresh


def read_text(source: str, split: str) -> str:
    """Returns the text of `source`: "builtin", a file, or `hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]` through the `datasets`
    package.
    """
    if source == BUILTIN:
        return builtin_text(split)
    if source.startswith(HF_PREFIX):
        return _dataset_text(source.removeprefix(HF_PREFIX))
    try:
        return Path(source).expanduser().read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the text {source!r} ({error}): give a UTF-8 file, or {BUILTIN!r}") from None


def _dataset_text(name: str) -> str:
    path, config, split, column = (name.split(":") + [""] * 4)[:4]
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{HF_PREFIX}{name} needs the datasets package: pip install datasets") from None
    try:
        rows = load_dataset(path, config or None, split=split or "train")
        return "\n\n".join(rows[column or "text"])
    except Exception as error:  # a dozen kinds, from the network to a misspelt column
        raise ValueError(f"cannot get the dataset {name!r} ({type(error).__name__}: {error}): check its name") from None


def text_digest(text: str) -> str:
    """Returns twelve hexadecimal digits that tell one text from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def calibration_windows(token_ids: list[int], num_windows: int, length: int) -> list[list[int]]:
    """Returns at most `num_windows` pieces of `length` tokens without overlap, evenly spread over the text."""
    available = len(token_ids) // length
    if available == 0:
        raise ValueError(f"the calibration text has {len(token_ids)} tokens, fewer than one sequence of {length}")
    count = min(num_windows, available)
    starts = [i * available // count * length for i in range(count)]
    return [token_ids[start : start + length] for start in starts]
