# killed-by: other_separators_stay_in_the_line | str.splitlines splits too much
"""Lines are split by str.splitlines(), which also splits at U+2028 and other characters.

httpx-sse did it (https://github.com/florimondmanca/httpx-sse/issues/34): a JSON text with U+2028 was torn, and
clients of tool servers waited forever.
"""

import codecs
import re

LINE_END = re.compile("\r\n|\r|\n")


class EventStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.line, self.data, self.after_cr, self.at_start = "", [], False, True

    def encode(self, data: str) -> bytes:
        return "".join(f"data: {line}\n" for line in (data.splitlines() or [""])).encode() + b"\n"

    def feed(self, chunk: bytes) -> list[str]:
        text = self.decoder.decode(chunk)
        if text and self.at_start:
            text, self.at_start = text.removeprefix("\ufeff"), False
        if text and self.after_cr:
            text, self.after_cr = text.removeprefix("\n"), False
        self.after_cr = self.after_cr or text.endswith("\r")
        first, *others = (line.removesuffix("\n") for line in (text + "|").splitlines())
        others[-1:] = [others[-1][:-1]] if others else []
        self.line += first if others else first[:-1]
        events = []
        for other in others:
            self.end_line(events)
            self.line = other
        return events

    def end_line(self, events: list[str]) -> None:
        name, _, value = self.line.partition(":")
        if name == "data":
            self.data.append(value.removeprefix(" "))
        elif not self.line and self.data:
            events.append("\n".join(self.data))
            self.data = []
