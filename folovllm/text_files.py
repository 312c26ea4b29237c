"""Text files of users, read the same way everywhere: UTF-8, a byte order mark dropped, lines that end at "\\n".

Milestone: M1. vLLM counterpart: none; vLLM's commands iterate over Python's text files.

`str.splitlines` also splits at form feeds, U+0085, U+2028 and six more characters, and Python's text mode turns a lone
"\\r" into a line end. All of those occur inside prompts, so neither is used on what a user wrote.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

BOM = "\ufeff"


def read_text_file(path: str | Path) -> str:
    """The text of a file as it stands, line ends included. Raises OSError, or ValueError if it is not UTF-8."""
    return decode_text(Path(path).expanduser().read_bytes())


def decode_text(data: bytes) -> str:
    """UTF-8 without its byte order mark. Raises UnicodeDecodeError, which is a ValueError."""
    return data.decode("utf-8").removeprefix(BOM)


def read_stdin() -> str:
    """All of stdin, read as bytes if it has any: its text mode would make a lone "\\r" a line end."""
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().removeprefix(BOM) if buffer is None else decode_text(buffer.read())


def stdin_lines() -> Iterator[str]:
    """The lines of stdin as they come in, each with its end."""
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin)):
        text = line if isinstance(line, str) else line.decode("utf-8")
        yield text if number else text.removeprefix(BOM)


def split_lines(text: str) -> list[str]:
    """Lines that end at "\\n" or "\\r\\n", without those ends. E.g. "a\\u2028b\\r\\nc\\n" -> ["a\\u2028b", "c"]."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
