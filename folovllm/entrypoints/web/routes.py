"""The routes of the page: `/`, `/static/{name}` and `/live`.

Milestone: M8. vLLM counterpart: none.

The page needs no other host and no inline script: its policy forbids both, so that the text of a model or a stranger
cannot become code. `/live` sends the lines of folovllm/trace/live.py as server-sent events.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from folovllm.entrypoints.openai.errors import not_found, shutting_down
from folovllm.entrypoints.openai.state import ServerState, server_state
from folovllm.trace.view import VIEWER

WEB = Path(__file__).parent
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {name: WEB / name for name in ("chat.js", "answer.js", "live.js", "client.js", "style.css", "icon.svg")}
FILES |= {name: VIEWER / name for name in ("model.js", "why.js", "draw.js", "colours.js")}
FILES["viewer.css"] = VIEWER / "style.css"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOOK_UP_EVERY = 1.0  # seconds: a silent stream looks whether the server is shutting down
SIGN_OF_LIFE_EVERY = 15  # silent seconds, so that no proxy takes the stream for dead

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    return _file(WEB / "page.html")


@router.get("/static/{name}")
async def static(name: str) -> Response:
    if name not in FILES:
        raise not_found(f"the page has no file {name!r}")
    return _file(FILES[name])


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)


@router.get("/live")
async def live(request: Request) -> StreamingResponse:
    """The header of a live trace, a snapshot, and then a record per step, until the client leaves."""
    state = server_state(request)
    if state.is_draining:
        raise shutting_down()
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(state), media_type="text/event-stream", headers=headers)


async def _events(state: ServerState) -> AsyncIterator[bytes]:
    """Ends within a second of the beginning of a shutdown, which therefore never waits for watchers."""
    silent = 0.0
    with state.engine.watch() as watcher:
        while not state.is_draining:
            try:
                async with asyncio.timeout(LOOK_UP_EVERY):
                    line = await anext(watcher)
            except TimeoutError:
                silent += LOOK_UP_EVERY
                if silent % SIGN_OF_LIFE_EVERY == 0:
                    yield b": still here\n\n"
            except StopAsyncIteration:
                return
            else:
                silent = 0.0
                yield state.event_stream.encode(line)
