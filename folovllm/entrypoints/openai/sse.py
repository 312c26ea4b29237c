r"""EventStream: server-sent events, the format in which an answer streams over HTTP. Both halves: encode and parse.

Milestone: M8. vLLM counterpart: none; the stream generators in vllm/entrypoints/openai/serving_chat.py write
"data: ...\n\n" in place. Left out: event names, ids and retry times, which OpenAI's streams do not use.

The format is WHATWG's (https://html.spec.whatwg.org/multipage/server-sent-events.html). An event is a group of lines,
and an empty line ends it. A connection delivers bytes in any cut, also inside a character or between \r and \n:

    b'data: {"te'   b'xt": "\xe4\xbd'   b'\xa0"}\n\nda'   b'ta: [DONE]\n\n'   ->   '{"text": "你"}', '[DONE]'
"""

import re

DONE = "[DONE]"  # the data of OpenAI's last event
_LINE_END = re.compile("\r\n|\r|\n")
_LINE_END_BYTES = re.compile(b"\r\n|\r|\n")


class EventStream:
    """Encodes events for a response, or parses the bytes of one. It is the part serve.event_stream.

    `encode` keeps no state, so all responses of a server share one object. `feed` needs an object per connection.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # of the line that has not ended
        self._data: list[str] = []  # the lines of data of the event that has not ended
        self._is_first_line = True
        self._skip_newline = False  # the last chunk ended with \r: a \n at the start of the next belongs to it

    def encode(self, data: str) -> bytes:
        """Returns the event that carries `data`. Each line of `data` gets a line of its own.

        `str.splitlines` would not do: it also splits at characters that are no line end here, such as U+2028.
        """
        if "\n" in data or "\r" in data:
            data = "\ndata: ".join(_LINE_END.split(data))
        return f"data: {data}\n\n".encode()

    def feed(self, chunk: bytes) -> list[str]:
        """Takes the next bytes of the connection. Returns the data of every event that they complete."""
        if self._skip_newline and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_newline = False
        if not chunk:
            return []
        self._skip_newline = chunk.endswith(b"\r")
        # \r and \n never occur inside a UTF-8 character, so bytes can be split into lines before they are decoded.
        first, *others = _LINE_END_BYTES.split(chunk)
        self._line += first
        events: list[str] = []
        for start_of_next in others:
            self._end_line(events)
            self._line += start_of_next
        return events

    def _end_line(self, events: list[str]) -> None:
        """Reads the line that has ended. If it is empty, the event has ended too and is added to `events`."""
        line = self._line.decode("utf-8-sig" if self._is_first_line else "utf-8", errors="replace")
        self._line.clear()
        self._is_first_line = False
        if line:
            name, _, value = line.partition(":")  # a comment begins with a colon: its name is ""
            if name == "data":
                self._data.append(value.removeprefix(" "))
        elif self._data:  # an event without data, such as a comment that keeps the connection open, is none
            events.append("\n".join(self._data))
            self._data.clear()
