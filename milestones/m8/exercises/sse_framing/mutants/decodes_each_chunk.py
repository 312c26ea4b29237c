# killed-by: a_character_may_be_cut | loses a character
"""Each chunk is decoded by itself, so a character in two chunks becomes U+FFFD.

Fabric's chat page did it (pull 2203): fine in English, and now and then a broken character in Chinese.
"""

import re

LINE_END = re.compile("\r\n|\r|\n")


class EventStream:
    def __init__(self) -> None:
        self.line, self.data, self.after_cr, self.at_start = "", [], False, True

    def encode(self, data: str) -> bytes:
        return "".join(f"data: {line}\n" for line in LINE_END.split(data)).encode() + b"\n"

    def feed(self, chunk: bytes) -> list[str]:
        text = chunk.decode(errors="replace")
        if text and self.at_start:
            text, self.at_start = text.removeprefix("\ufeff"), False
        if text and self.after_cr:
            text, self.after_cr = text.removeprefix("\n"), False
        self.after_cr = self.after_cr or text.endswith("\r")
        first, *others = LINE_END.split(text)
        self.line += first
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
