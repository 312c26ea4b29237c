"""OpenAIDouble: a server with OpenAI's API whose answers the test writes, byte for byte. It shows a client's faults.

It runs in a thread of the test process on 127.0.0.1, at a free port. `calls` is what came: (path, JSON body, headers).
"""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager

from aiohttp import web

DONE = "data: [DONE]\n\n"


def event(**fields):
    """The text of one server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"


def chunk(content=None, finish_reason=None):
    delta = {} if content is None else {"content": content}
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])


def usage(completion_tokens):
    return event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": completion_tokens})


class OpenAIDouble:
    def __init__(self):
        self.calls = []
        self.models = [{"id": "tiny", "max_model_len": 200}]
        self.count = lambda messages: sum(len(m["content"]) for m in messages)  # /tokenize; None: no such route
        self.answer: Callable = lambda body: (200, {})  # body -> (status, JSON) or a list of texts to stream
        self.cut = 10**9  # bytes per write of a stream
        self.hang = False  # after the last text of a stream: never end
        self.drop = False  # after the last text of a stream: cut the connection
        self.num_left = 0  # clients that left in mid-stream
        self.num_open = self.most_open = 0  # streams that are open now, and the most that were
        self.url = ""

    async def _handle(self, request):
        body = await request.json() if request.can_read_body else None
        self.calls.append((request.path, body, dict(request.headers)))
        if request.path == "/v1/models":
            return web.json_response({"object": "list", "data": self.models})
        if request.path == "/tokenize" and self.count is not None:
            return web.json_response({"count": self.count(body["messages"])})
        if request.path not in ("/v1/chat/completions", "/v1/completions"):
            return web.json_response({"detail": "Not Found"}, status=404)
        answer = self.answer(body)
        if isinstance(answer, list):
            return await self._stream(request, answer)
        status, content = answer[:2]
        headers = answer[2] if len(answer) > 2 else {}
        if isinstance(content, str):
            return web.Response(text=content, status=status, headers=headers)
        return web.json_response(content, status=status, headers=headers)

    async def _stream(self, request, texts):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            for text in texts:
                data = text.encode()
                for start in range(0, len(data), self.cut):
                    await response.write(data[start : start + self.cut])
                    await asyncio.sleep(0)
            for _ in range(1200 if self.hang else 0):  # at most a minute
                await asyncio.sleep(0.05)
                await response.write(b": still here\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.num_left += 1
            raise
        finally:
            self.num_open -= 1
        if self.drop:
            request.transport.abort()
        return response

    async def _serve(self, started, stop, idle_timeout):
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True, keepalive_timeout=idle_timeout)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await asyncio.get_running_loop().run_in_executor(None, stop.wait, 60.0)
        await runner.cleanup()


@contextmanager
def running_double(idle_timeout=60.0):
    """`idle_timeout`: after how many seconds without a request a connection is closed."""
    double, started, stop = OpenAIDouble(), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(double._serve(started, stop, idle_timeout)), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield double
    finally:
        stop.set()
        thread.join(10)
