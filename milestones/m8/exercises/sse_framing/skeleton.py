"""m8/sse_framing: text into frames, and bytes that come in any pieces back into texts."""


class EventStream:
    """Both halves of a connection that streams events. The engine makes one with EventStream()."""

    def __init__(self) -> None:
        """What must be remembered from one chunk to the next?"""

    def encode(self, data: str) -> bytes:
        """Returns the event that carries `data`: "data: " before each of its lines, and an empty line at the end."""
        raise NotImplementedError("m8/sse_framing: encode")

    def feed(self, chunk: bytes) -> list[str]:
        """Returns the data of the events that `chunk` completes, in order. What is unfinished waits for the next."""
        raise NotImplementedError("m8/sse_framing: feed")
