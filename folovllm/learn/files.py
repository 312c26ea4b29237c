"""What `folovllm learn` writes: errors that name the fix, and records that only grow, one line of JSON per event.

Milestone: M0. vLLM counterpart: none.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folovllm.text_files import split_lines


@contextlib.contextmanager
def friendly_os_errors() -> Iterator[None]:
    """Turns an OSError of the body into a ValueError that names the fix."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cannot write {error.filename}: {error.strerror}; make the folder writable, or choose another with --work"
        ) from None


def append_record(path: Path, entry: dict[str, Any]) -> None:
    """Appends a line. If the line before was cut off, this one is not lost with it."""
    text = json.dumps(entry, ensure_ascii=False) + "\n"
    with friendly_os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
            text = "\n" + text
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many of its lines are none. A file that is not there has no records."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; make it readable, or move it away") from None
    records, num_unreadable = [], 0
    for line in split_lines(text):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            records.append(value)
        elif line.strip():
            num_unreadable += 1
    return records, num_unreadable
