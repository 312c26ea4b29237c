# killed-by: a_chunk_holds_any_number_of_events | a chunk is what the network delivers
"""A chunk is taken for an event, as it is on a quiet machine.

evalscope did it (pull 1102): under load several events came in one chunk, and a run had no tokens at all. In Brave's
parser (issue 52830) the second half of a long event was dropped.
"""

import re

LINE_END = re.compile("\r\n|\r|\n")


class EventStream:
    def encode(self, data: str) -> bytes:
        return "".join(f"data: {line}\n" for line in LINE_END.split(data)).encode() + b"\n"

    def feed(self, chunk: bytes) -> list[str]:
        text = chunk.decode(errors="replace").strip()
        return [text.removeprefix("data:").removeprefix(" ")] if text.startswith("data:") else []
