"""Watchers: hand the lines of a live trace on to all watchers of a server; the front end's half of live.py.

Milestone: M8. vLLM counterpart: none.

Row 1: no torch. All methods are called in one event loop. The engine makes records only while a watcher is there, and a
watcher that reads too slowly costs a bounded amount of memory: its lines are dropped, and a fresh snapshot takes their
place. Each line is encoded once, for all watchers.
Of several engines (M10) each line has the number, "replica", and each engine has snapshots of its own. A line of the
type "dead" says that an engine has died; the next line of that engine is a header.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from folovllm.trace.record import to_json

MAX_LINES = 256  # that a watcher has not taken yet


class Watcher:
    """The lines for one watcher, as JSON texts: an async iterator that ends with `close`. Leaving `with` forgets it."""

    def __init__(self, watchers: "Watchers") -> None:
        self._watchers = watchers
        self._lines: deque[str] = deque()
        self._has_news = asyncio.Event()
        self._is_closed = False
        self._followed: set[int] = set()  # engines whose snapshot has come; until then, steps tell it nothing
        self.missing: set[int] = set()  # engines of which lines were dropped, and no snapshot has come since

    def put(self, kind: str | None, engine: int, line: str) -> None:
        """Takes a line: a step (`kind` None), a header, the snapshot that follows it, or "dead"."""
        if kind is None and engine not in self._followed:
            return
        if len(self._lines) >= MAX_LINES and kind != "snapshot":
            self._lines.clear()
            self.missing |= self._followed
            self._followed.clear()
            if kind is None:
                return
        self._lines.append(line)
        self._has_news.set()
        if kind == "snapshot":
            self._followed.add(engine)
            self.missing.discard(engine)

    def close(self) -> None:
        """What has been put is still handed out; then the iteration ends."""
        self._is_closed = True
        self._has_news.set()

    def __aiter__(self) -> "Watcher":
        return self

    async def __anext__(self) -> str:
        """The next line. If this is cancelled, no line is lost."""
        while not self._lines:
            if self._is_closed:
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        return self._lines.popleft()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._watchers.leave(self)


class Watchers:
    """All watchers of one engine. `ask("watch")` asks the engine for a snapshot, and `ask("unwatch")` to stop."""

    def __init__(self, ask: Callable[[str], None]) -> None:
        self._ask = ask
        self._watchers: set[Watcher] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._watchers)

    def join(self) -> Watcher:
        watcher = Watcher(self)
        if self._is_closed:
            watcher.close()
            return watcher
        self._watchers.add(watcher)
        self._ask("watch")
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """Forgets the watcher. Leaving twice is fine."""
        if watcher not in self._watchers:
            return
        self._watchers.discard(watcher)
        watcher.close()
        if not self._watchers and not self._is_closed:
            self._ask("unwatch")

    def put(self, lines: Iterable[dict[str, Any]]) -> None:
        """Takes what LiveFeed.take() gave."""
        if not self._watchers:
            return
        asked = {watcher: set(watcher.missing) for watcher in self._watchers}
        for line in lines:
            text = to_json(line)
            for watcher in self._watchers:
                watcher.put(line.get("type"), line.get("replica", 0), text)
        if any(watcher.missing - asked[watcher] for watcher in self._watchers):
            self._ask("watch")

    def close(self) -> None:
        """The engine has ended, so every iteration ends. Closing twice is fine."""
        self._is_closed = True
        for watcher in self._watchers:
            watcher.close()
        self._watchers.clear()
