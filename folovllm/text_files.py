"""Text files of users, read the same way everywhere: UTF-8, a byte order mark dropped, lines that end at "\\n".

Milestone: M1. vLLM counterpart: none; vLLM's commands iterate over Python's text files.

`str.splitlines` also splits at form feeds, U+0085, U+2028 and six more characters, and Python's text mode turns a lone
"\\r" into a line end. All of those occur inside prompts, so neither is used on what a user wrote.
"""

from pathlib import Path

BOM = "\ufeff"


def read_text_file(path: str | Path) -> str:
    """The text of a file as it stands, line ends included. Raises OSError, or ValueError if it is not UTF-8."""
    return decode_text(Path(path).expanduser().read_bytes())


def decode_text(data: bytes) -> str:
    """UTF-8 without its byte order mark. Raises UnicodeDecodeError, which is a ValueError."""
    return data.decode("utf-8").removeprefix(BOM)


def split_lines(text: str) -> list[str]:
    """Lines that end at "\\n" or "\\r\\n", without those ends. E.g. "a\\u2028b\\r\\nc\\n" -> ["a\\u2028b", "c"]."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
