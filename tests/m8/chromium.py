"""Pages in headless Chromium, driven over its DevTools protocol: for pages that talk to a server while a test looks.

tests/m2/browser_helpers.py is enough for pages that only have to be opened.
"""

import asyncio
import base64
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.m2.browser_helpers import CHROMIUM, FLAGS

START_TIMEOUT = 60.0  # seconds: a busy machine


class Page:
    """One tab. `errors` collects what the console calls an error, exceptions and refused resources included."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: dict[str, asyncio.Event] = {}
        self.errors: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            else:
                self._note(told["method"], told["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str([arg.get("value") for arg in params["args"]]))
        self._events.setdefault(method, asyncio.Event()).set()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = max(self._answers, default=0) + 1
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        told = await asyncio.wait_for(answer, START_TIMEOUT)
        assert "error" not in told, f"{method}: {told['error']}"
        return told.get("result", {})

    async def open(self, url: str) -> None:
        """Returns when the page and its scripts have been loaded."""
        loaded = self._events["Page.loadEventFired"] = asyncio.Event()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(loaded.wait(), START_TIMEOUT)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression. A promise is awaited."""
        told = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, expression: str, timeout: float = 30.0) -> Any:
        """Waits until a JavaScript expression is true, and returns its value."""
        end = asyncio.get_running_loop().time() + timeout
        while not (value := await self.evaluate(expression)):
            assert asyncio.get_running_loop().time() < end, f"never true: {expression}; errors: {self.errors}"
            await asyncio.sleep(0.05)
        return value

    async def text(self, element_id: str) -> str:
        value: str = await self.evaluate(f"document.getElementById({json.dumps(element_id)}).innerText")
        return value

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            told = {"text": text} if text and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **told)

    async def enter(self) -> None:
        await self.press("Enter", 13, "\r")

    async def click(self, element_id: str) -> None:
        await self.evaluate(f"document.getElementById({json.dumps(element_id)}).click()")

    async def resize(self, width: int, height: int, dark: bool = False, calm: bool = False) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **screen)
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if calm else "",
        }
        await self.call(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()]
        )

    async def screenshot(self, path: Path) -> None:
        told = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(told["data"]))


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """A browser with a new profile, which ends with the block: the address at which it takes commands."""
    assert CHROMIUM is not None
    profile.mkdir(parents=True, exist_ok=True)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{_port(profile / 'DevToolsActivePort')}"
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def chromium_page(browser: str) -> AsyncIterator[Page]:
    """A new tab of the browser at this address; it is closed with the block."""
    async with aiohttp.ClientSession(browser) as session:
        async with session.put("/json/new?about:blank") as answer:
            tab = await answer.json(content_type=None)
        try:
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
                listening.cancel()
        finally:
            await (await session.get(f"/json/close/{tab['id']}")).read()


def _port(file: Path) -> int:
    """The port that the browser has chosen. It writes it into its profile."""
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        time.sleep(0.02)
    raise AssertionError("the browser did not start")
