# killed-by: a_cr_and_its_lf_may_be_cut | CR and LF are one line end
"""It forgets that the last chunk ended with CR, and takes the LF that follows for a line of its own.

The event ends too early, and only where the network cuts between the two bytes.
"""

import codecs
import re

LINE_END = re.compile("\r\n|\r|\n")


class EventStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.line, self.data, self.at_start = "", [], True

    def encode(self, data: str) -> bytes:
        return "".join(f"data: {line}\n" for line in LINE_END.split(data)).encode() + b"\n"

    def feed(self, chunk: bytes) -> list[str]:
        text = self.decoder.decode(chunk)
        if text and self.at_start:
            text, self.at_start = text.removeprefix("\ufeff"), False
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
