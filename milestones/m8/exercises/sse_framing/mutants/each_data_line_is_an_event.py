# killed-by: lines_of_an_event_are_joined | events of two and of three data lines
"""Every data line is returned by itself, and the empty line is ignored.

It works with OpenAI, which writes JSON in one line, and fails with servers that write it in several (term-llm,
pull 454).
"""

import codecs
import re

LINE_END = re.compile("\r\n|\r|\n")


class EventStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.line, self.data, self.after_cr, self.at_start = "", [], False, True

    def encode(self, data: str) -> bytes:
        return "".join(f"data: {line}\n" for line in LINE_END.split(data)).encode() + b"\n"

    def feed(self, chunk: bytes) -> list[str]:
        text = self.decoder.decode(chunk)
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
            events.append(value.removeprefix(" "))
