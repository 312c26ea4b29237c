# killed-by: what_is_no_data_is_ignored | returned ['a', 'a', 'the', 'a']
"""All spaces around the value are removed, and not only the one after the colon.

A token such as " the" begins with a space, so a server that streams plain text loses the spaces between its words.
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
            self.data.append(value.strip())
        elif not self.line and self.data:
            events.append("\n".join(self.data))
            self.data = []
