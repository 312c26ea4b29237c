# killed-by: an_event_is_not_held_back | shown late
"""A CR at the end of a chunk is kept until it is known whether a LF follows, and the event with it.

The parse is right, and the last event of a stream comes when the next one does: never.
"""

import codecs
import re

LINE_END = re.compile("\r\n|\r|\n")


class EventStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.line, self.data, self.held, self.at_start = "", [], "", True

    def encode(self, data: str) -> bytes:
        return "".join(f"data: {line}\n" for line in LINE_END.split(data)).encode() + b"\n"

    def feed(self, chunk: bytes) -> list[str]:
        text = self.held + self.decoder.decode(chunk)
        self.held = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r")
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
