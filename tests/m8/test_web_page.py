"""The page at `/`: its files and the stream behind it, and, in headless Chromium, what a person sees.

The server is the real one, in a thread; its model is the fake one, or a script.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import aiohttp
import pytest

from folovllm.core.sched.output import NewRequestData, SchedulerOutput
from folovllm.entrypoints.web.routes import FILES, WEB
from folovllm.executor.fake import FakeExecutor, FakeRequest
from folovllm.outputs import ModelRunnerOutput
from folovllm.trace import watch as trace_watch
from tests.m1.tiny_tokenizers import byte_ids
from tests.m2.browser_helpers import needs_browser
from tests.m8.chromium import Page, chromium, chromium_page
from tests.m8.server_process import RunningServer, running_server
from tests.m8.serving_helpers import TIMEOUT, VOCAB_SIZE, eventually, run_async

pytestmark = pytest.mark.m8

ANSWER = "A block has 16 slots. <img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> "
FEW_BLOCKS = {"num_kv_blocks": 65, "max_model_len": 512}


class Scripted(FakeExecutor):
    """Answers every request with ANSWER, again and again, a byte per token. A step takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(VOCAB_SIZE)
        self.script, self.seconds = byte_ids(ANSWER.encode()), seconds

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        time.sleep(self.seconds)
        output = super().sample(handle)
        for request_id, sampled in output.sampled_token_ids.items():
            if sampled:
                state = self.requests[request_id]
                position = len(state.token_ids) - state.num_prompt_tokens - 1  # type: ignore[attr-defined]
                sampled[0] = state.token_ids[-1] = self.script[position % len(self.script)]
        return output

    def _new_state(self, new: NewRequestData) -> FakeRequest:  # type: ignore[override]
        state = FakeExecutor._new_state(new)
        state.num_prompt_tokens = len(new.prompt_token_ids)  # type: ignore[attr-defined]
        return state


def page_server(seconds: float = 0.0, api_key: tuple[str, ...] = (), **engine: Any) -> Any:
    factory = lambda config: Scripted(seconds)  # noqa: E731
    return running_server({"executor_factory": factory, **FEW_BLOCKS, **engine}, api_key=api_key)


# ---- the files


def test_the_page_s_files_are_there_and_need_no_other_host() -> None:
    with page_server() as server:
        page = server.get("/")
        assert page.status == 200 and page.headers["content-type"].startswith("text/html")
        used = set(re.findall(r'(?:src|href)="static/([^"]+)"', page.body.decode()))
        for name in FILES:
            answer = server.get(f"/static/{name}")
            text = answer.body.decode()
            assert answer.status == 200 and answer.headers["x-content-type-options"] == "nosniff", name
            assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|//cdn|@import|innerHTML|eval\(", text), name
            used |= set(re.findall(r'from "\./([^"]+)"', text))
        assert used == set(FILES), "every file is used, and no file is missing"
        for path in ("/static/nothing.js", "/static/..%2Froutes.py", "/static/routes.py", "/static/page.html"):
            assert server.get(path).status == 404


def test_the_policy_forbids_what_the_page_does_not_need() -> None:
    with page_server() as server:
        headers = server.get("/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    html = (WEB / "page.html").read_text()
    assert not re.findall(r"<script>|<style>| style=| on[a-z]+=", html), "the policy would not let these work"


# ---- /live


def test_watchers_come_and_go_and_recording_stops_with_the_last() -> None:
    """Each sees the header, a snapshot, and every step. A client that has gone is forgotten."""
    with page_server(0.005) as server:
        asyncio.run(asyncio.wait_for(_watch_twice(server), TIMEOUT))


async def _watch_twice(server: RunningServer) -> None:
    watchers, recorded = server.state.engine._watchers, []
    put = watchers.put
    watchers.put = lambda lines: (recorded.append(len(lines)), put(lines))  # type: ignore[method-assign]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        answering = await session.post("/v1/completions", json={"prompt": [7], "max_tokens": 500, "stream": True})
        streams = [await session.get("/live") for _ in range(2)]
        assert streams[0].headers["content-type"].startswith("text/event-stream")
        for stream in streams:
            kinds = [line.get("type") async for line in first_lines(stream, 12)]
            assert kinds[:2] == ["header", "snapshot"] and None in kinds[2:]
        assert len(watchers) == 2
        streams[0].close()
        await eventually(lambda: len(watchers) == 1)
        assert [line async for line in first_lines(streams[1], 3)]
        streams[1].close()
        await eventually(lambda: len(watchers) == 0)
        await eventually(lambda: recorded[-5:] == [0] * 5)
        answering.close()


async def first_lines(stream: aiohttp.ClientResponse, count: int) -> AsyncIterator[dict[str, Any]]:
    """The data of the next `count` events."""
    while count:
        line = await stream.content.readline()
        assert line, "the stream has ended"
        if line.startswith(b"data: "):
            count -= 1
            yield json.loads(line[6:])


def test_a_client_that_does_not_read_costs_a_bounded_amount_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket fills up, then the watcher's own queue; what is dropped is replaced by a snapshot."""
    monkeypatch.setattr(trace_watch, "MAX_LINES", 32)  # the rest of the time goes into filling the socket
    with page_server(num_kv_blocks=1500, max_model_len=4096) as server:
        asyncio.run(asyncio.wait_for(_read_late(server), TIMEOUT))


async def _read_late(server: RunningServer) -> None:
    watchers, asked = server.state.engine._watchers, []
    ask = watchers._ask
    watchers._ask = lambda what: (asked.append(what), ask(what))  # type: ignore[assignment, func-returns-value]
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that it is full soon
    narrow.connect(("127.0.0.1", server.port))
    narrow.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=narrow, limit=2**20)
    writer.write(b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        body = {"prompt": [[i] * 200 for i in range(24)], "max_tokens": 3500, "stream": True, "ignore_eos": True}
        answering = await session.post("/v1/completions", json=body)
        while len(asked) < 3:  # the first one is the watcher's coming
            assert all(len(watcher._lines) <= trace_watch.MAX_LINES + 1 for watcher in watchers._watchers)
            await asyncio.sleep(0.001)
        answering.close()
        await eventually(lambda: server.state.engine.num_unfinished == 0)
    lines: list[dict[str, Any]] = []
    while len(lines) < 10 or lines[-1]["queues"].get("running") != [] or lines[-1]["queues"]["num_waiting"]:
        text = await reader.readline()
        if text.startswith(b"data: ") and b'"header"' not in text:
            lines.append(json.loads(text[6:]))
    writer.close()
    assert sum(line.get("type") == "snapshot" for line in lines) > 1
    for before, line in itertools.pairwise(lines):
        if "type" not in line:
            assert line["step"] == before["step"] + 1, "after a gap there is a snapshot"


def test_a_watcher_does_not_hold_up_the_end_of_the_server() -> None:
    with page_server() as server:

        async def watch() -> tuple[list[dict[str, Any]], float]:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
                stream = await session.get("/live")
                lines = [line async for line in first_lines(stream, 2)]
                server.send_signal()
                start = time.monotonic()
                assert not (await stream.read()).strip()
                return lines, time.monotonic() - start

        lines, seconds = asyncio.run(asyncio.wait_for(watch(), TIMEOUT))
        assert [line["type"] for line in lines] == ["header", "snapshot"], "an idle engine tells at once how it is"
        assert server.wait() == 0 and seconds < 10


def test_live_needs_the_key_and_the_page_does_not() -> None:
    with page_server(api_key=("secret",)) as server:
        assert server.get("/").status == server.get("/static/chat.js").status == 200
        assert server.get("/live").status == 401


# ---- in the browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One browser for all tests: each has a server, and therefore an origin, of its own."""
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


def in_browser(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        run_async(lambda: test(**arguments))

    for mark in needs_browser:
        run = mark(run)
    return run


@contextlib.asynccontextmanager
async def open_chat(server: RunningServer, browser: str, **size: Any) -> AsyncIterator[Page]:
    """The page, connected with the engine. No error may be in its console at the end."""
    async with chromium_page(browser) as page:
        await page.resize(**{"width": 1280, "height": 860} | size)
        await page.open(f"http://127.0.0.1:{server.port}/")
        await page.until("document.getElementById('state').textContent !== 'connecting'")
        yield page
        assert page.errors == []


async def say(page: Page, text: str) -> None:
    await page.evaluate("document.getElementById('prompt').focus()")
    await page.type(text)
    await page.enter()


FOOTS = "[...document.querySelectorAll('.assistant .foot')].map((foot) => foot.textContent)"
IS_DONE = "!document.querySelector('.running') && document.getElementById('stop').hidden"
BLOCKS = "document.getElementById('blocks').getAttribute('aria-label')"
BUSY_BLOCKS = f"/^[1-9]\\d* blocks held/.test({BLOCKS})"
NO_BLOCKS = f"/^0 blocks held/.test({BLOCKS})"
COLOURED = """(() => {
  const canvas = document.getElementById('blocks');
  const pixel = canvas.getContext('2d').getImageData(8, 28, 1, 1).data;  // inside block 1, which fills from below
  return Math.max(...pixel.slice(0, 3)) - Math.min(...pixel.slice(0, 3)) > 60;
})()"""


@in_browser
async def test_an_answer_is_streamed_and_the_engine_shows_it(browser: str) -> None:
    with page_server(0.02) as server:
        async with open_chat(server, browser) as page:
            await page.until(NO_BLOCKS)
            await page.evaluate("document.getElementById('max-tokens').value = 120")
            await say(page, "What is a block?")
            await page.until(f"{BUSY_BLOCKS} && {COLOURED}")
            assert "you" in await page.text("running") and await page.text("num-running") == "1"
            assert await page.text("state") == "working"
            assert re.fullmatch(r"1 of [\d,]+", await page.text("tokens"))
            used, reserved = re.fullmatch(r"(\d+) of (\d+)", await page.text("slots")).groups()  # type: ignore[union-attr]
            assert 0 < int(used) <= int(reserved) and int(reserved) % 16 == 0
            partial = await page.evaluate("document.querySelector('.assistant .text').textContent")
            assert 0 < len(partial) < 120 and ANSWER.startswith(partial[:50])
            await page.until(IS_DONE)
            text = await page.evaluate("document.querySelector('.assistant .text').textContent")
            assert text == (ANSWER * 2)[:120]
            (foot,) = await page.evaluate(FOOTS)
            assert re.fullmatch(
                r"120 tokens · [\d.]+ tok/s · first token after \d\.\d\d s · 0 of \d+ prompt tokens cached"
                r" · ended at the limit of tokens",
                foot,
            )
            await page.until(f"{NO_BLOCKS} && !{COLOURED}")
            assert await page.text("state") == "idle" and await page.text("running") == "no request"
            assert int(await page.text("step")) >= 120


EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>"
ONE_EVIL_CHUNK = """(() => {
  const [ask, chunk] = [fetch, JSON.stringify({ choices: [{ index: 0, delta: { content: EVIL } }] })];
  const answer = () => new Response(`data: ${chunk}\\n\\ndata: [DONE]\\n\\n`);
  globalThis.fetch = async (path, options) => path.startsWith("v1/chat") ? answer() : ask(path, options);
})()""".replace("EVIL", json.dumps(EVIL))
NO_ELEMENTS = "document.querySelectorAll('#messages :is(img, script, b), #engine img, .chip *, #why li *').length"


@in_browser
async def test_what_the_model_writes_is_text(browser: str) -> None:
    """Also if the whole attack comes in one chunk, and in the user's own message."""
    with page_server() as server:
        async with open_chat(server, browser) as page:
            await page.evaluate("document.getElementById('max-tokens').value = 200")
            await say(page, EVIL)
            await page.until(IS_DONE)
            await page.evaluate(ONE_EVIL_CHUNK)
            await say(page, "again")
            await page.until(f"{IS_DONE} && document.querySelectorAll('.message').length === 4")
            texts = await page.evaluate("[...document.querySelectorAll('.text')].map((text) => text.textContent)")
            assert texts == [EVIL, (ANSWER * 2)[:200], "again", EVIL]
            assert await page.evaluate(NO_ELEMENTS) == 0 and await page.evaluate("document.title") == "FoloVLLM"


@in_browser
async def test_a_stranger_s_request_id_is_text(browser: str) -> None:
    """A client chooses it with X-Request-Id, and every page that watches the engine shows it."""
    evil = "<img src=x onerror=document.title='owned'>"
    with page_server(0.02) as server:
        async with open_chat(server, browser) as page, aiohttp.ClientSession() as session:
            await page.evaluate("document.getElementById('why-box').open = true")
            body = {"prompt": [7], "max_tokens": 400, "stream": True}
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            answer = await session.post(url, json=body, headers={"X-Request-Id": evil})
            await page.until(f"document.getElementById('running').innerText.includes({json.dumps(evil)})")
            await page.until(f"document.getElementById('why').innerText.includes({json.dumps(evil)})")
            assert await page.evaluate(NO_ELEMENTS) == 0 and await page.evaluate("document.title") == "FoloVLLM"
            answer.close()


@in_browser
async def test_stop_aborts_the_request(browser: str) -> None:
    """By the button and by Escape. What has come stays, and the conversation goes on from there."""
    with page_server(0.02) as server:
        async with open_chat(server, browser) as page:
            for number, stop in enumerate((lambda: page.click("stop"), lambda: page.press("Escape", 27)), start=1):
                await say(page, "Go on for ever")
                await page.until(f"document.querySelectorAll('.assistant .text')[{number - 1}]?.textContent.length > 5")
                assert server.state.engine.num_unfinished == 1
                await stop()
                await page.until(IS_DONE)
                await eventually(lambda: server.state.engine.num_unfinished == 0)
                foots = await page.evaluate(FOOTS)
                assert len(foots) == number and foots[-1].endswith(" · stopped")
                await page.until(NO_BLOCKS)
            await page.evaluate("document.getElementById('max-tokens').value = 3")
            await say(page, "And now?")
            await page.until(IS_DONE)
            cached = re.search(r"(\d+) of (\d+) prompt tokens cached", (await page.evaluate(FOOTS))[-1])
            assert cached and int(cached[1]) >= 16, "the conversation so far is in the prefix cache"


@in_browser
async def test_a_new_conversation_begins_with_the_system_prompt_alone(browser: str) -> None:
    with page_server() as server:
        async with open_chat(server, browser) as page:
            await page.evaluate("document.getElementById('max-tokens').value = 2")
            lengths = []
            for _ in range(2):
                await say(page, "Hello")
                await page.until(IS_DONE)
                lengths.append(re.search(r"of (\d+) prompt", (await page.evaluate(FOOTS))[-1]))
            await page.click("new")
            assert await page.evaluate("document.querySelectorAll('.message').length") == 0
            await say(page, "Hello")
            await page.until(IS_DONE)
            lengths.append(re.search(r"of (\d+) prompt", (await page.evaluate(FOOTS))[-1]))
            await page.click("new")
            await page.evaluate("document.getElementById('system').value = 'Be brief.'")
            await say(page, "Hello")
            await page.until(IS_DONE)
            lengths.append(re.search(r"of (\d+) prompt", (await page.evaluate(FOOTS))[-1]))
            first, second, third, fourth = (int(found[1]) for found in lengths if found)
            assert first == third < second and fourth > first


@in_browser
async def test_several_answers_at_once_share_a_batch(browser: str) -> None:
    with page_server(0.02) as server:
        async with open_chat(server, browser) as page:
            await page.evaluate("document.getElementById('max-tokens').value = 60")
            await page.evaluate("document.getElementById('at-once').value = 3")
            await say(page, "Hello")
            await page.until("document.querySelectorAll('#running .chip.mine').length === 3")
            names = await page.evaluate("[...document.querySelectorAll('#running .chip')].map((c) => c.textContent)")
            assert len({name.split()[1] for name in names}) == 3, f"one name for two answers: {names}"
            await page.until(IS_DONE)
            (foot,) = await page.evaluate(FOOTS)
            assert foot.startswith("60 tokens · ") and re.search(r" · 3 answers: [\d.]+ tok/s together$", foot)
            assert await page.evaluate("document.querySelectorAll('.message').length") == 2


@in_browser
async def test_an_error_of_the_server_is_said_and_the_message_comes_back(browser: str) -> None:
    with page_server() as server:
        async with chromium_page(browser) as page:
            await page.open(f"http://127.0.0.1:{server.port}/")
            await page.evaluate("document.getElementById('max-tokens').value = 100000")
            await say(page, "Too long")
            await page.until("document.querySelectorAll('.failed').length")
            (foot,) = await page.evaluate(FOOTS)
            assert "max_tokens" in foot and "100000" in foot
            assert await page.evaluate("document.getElementById('prompt').value") == "Too long"
            assert [error for error in page.errors if "400" not in error] == []


@in_browser
async def test_the_key_is_asked_for_only_where_there_is_one(browser: str) -> None:
    with page_server() as server:
        async with open_chat(server, browser) as page:
            assert await page.evaluate("document.getElementById('key-row').hidden")
    with page_server(api_key=("secret",)) as server:
        async with chromium_page(browser) as page:
            await page.open(f"http://127.0.0.1:{server.port}/")
            await page.until("!document.getElementById('key-row').hidden")
            await page.until("document.getElementById('state').dataset.is === 'lost'")
            await page.evaluate("document.getElementById('key').focus()")
            await page.type("secret")
            await page.enter()
            await page.until("document.getElementById('state').dataset.is === 'idle'")
            await page.evaluate("document.getElementById('max-tokens').value = 3")
            await say(page, "Hello")
            await page.until(IS_DONE)
            assert (await page.evaluate(FOOTS))[0].startswith("3 tokens")
            assert await page.evaluate("document.getElementById('key-row').hidden")
            assert [error for error in page.errors if "401" not in error] == []


@in_browser
async def test_several_requests_have_colours_and_a_queue(browser: str) -> None:
    """Two seats, four requests, a pool that preempts: queues, chips, the page after a reload in mid-run."""
    with page_server(0.02, max_num_seqs=2) as server:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
            body = {"max_tokens": 400, "stream": True}
            answers = [await session.post("/v1/completions", json={"prompt": [7, i], **body}) for i in range(2)]
            waiting = [asyncio.ensure_future(session.post("/v1/completions", json={"prompt": [8, i], **body}))
                       for i in range(2)]  # fmt: skip
            async with open_chat(server, browser) as page:
                await page.until("document.querySelectorAll('#running .chip').length === 2")
                await page.until("document.querySelectorAll('#waiting .chip').length === 2")
                colours = await page.evaluate(
                    "[...document.querySelectorAll('.chip')].map((chip) => chip.style.getPropertyValue('--owner'))"
                )
                assert len(set(colours)) == 4
                await page.evaluate("document.getElementById('why-box').open = true")
                await page.until("document.getElementById('why').innerText.includes('all 2 seats are taken')")
                await page.evaluate("document.querySelector('#running .chip').click()")
                assert (
                    await page.evaluate("document.querySelector('#running .chip').getAttribute('aria-pressed')")
                    == "true"
                )
                await page.click("pause")
                step = await page.text("step")
                await eventually(lambda: len(server.state.engine._watchers) == 0)
                await page.evaluate("document.querySelector('#running .chip').click()")
                assert await page.text("step") == step and await page.text("state") == "paused"
                await page.click("pause")
                await page.until(f"document.getElementById('step').innerText !== '{step}'")
            for answer in answers:
                answer.close()
            for future in waiting:
                (await future).close()


@in_browser
async def test_on_a_phone_the_parts_take_turns_and_nothing_is_wider_than_the_screen(browser: str) -> None:
    fits = "document.documentElement.scrollWidth <= innerWidth"
    with page_server(0.02) as server:
        async with open_chat(server, browser, width=360, height=720, dark=True, calm=True) as page:
            await say(page, "A long word: " + "x" * 200)
            await page.until("document.querySelector('.assistant .text')?.textContent.length > 5")
            animation = "getComputedStyle(document.querySelector('.running .text'), '::after').animationName"
            assert await page.evaluate(animation) == "none"
            assert await page.evaluate(fits) and not await page.evaluate(
                "document.getElementById('engine').clientWidth"
            )
            await page.click("show-engine")
            await page.until(BUSY_BLOCKS)
            assert await page.evaluate(fits)
            assert await page.evaluate("document.getElementById('chat').clientWidth") == 0
            await page.click("show-chat")
            await page.click("stop")
            await page.until(IS_DONE)


@in_browser
async def test_every_control_has_a_name_and_can_be_reached_with_the_keyboard(browser: str) -> None:
    with page_server() as server:
        async with open_chat(server, browser) as page:
            reached, focused = set(), "document.activeElement.id || document.activeElement.textContent.trim()"
            for _ in range(16):
                await page.press("Tab", 9)
                reached.add(await page.evaluate(focused))
            assert {"prompt", "send", "new", "pause", "Settings", "Why, in this step"} <= reached
            nameless = """[...document.querySelectorAll('button, input, textarea, canvas')].filter((e) =>
                !(e.textContent.trim() || e.getAttribute('aria-label') || e.closest('label'))).map((e) => e.id)"""
            assert await page.evaluate(nameless) == []
