# killed-by: every_line_gets_a_data_line | expected b'data: one
"""The text goes into the frame as it is, with its line ends.

JSON has none, so it works until an error message or a raw text is streamed. A text with an empty line then ends the
event, and what follows is read as another one.
"""

import codecs
import re

LINE_END = re.compile("\r\n|\r|\n")


class EventStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.line, self.data, self.after_cr, self.at_start = "", [], False, True

    def encode(self, data: str) -> bytes:
        return f"data: {data}\n\n".encode()

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
            self.data.append(value.removeprefix(" "))
        elif not self.line and self.data:
            events.append("\n".join(self.data))
            self.data = []
