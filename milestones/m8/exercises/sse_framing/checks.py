"""The checks of m8/sse_framing: frames, cuts in every place, and a stream over a real socket."""

import asyncio
import json
import random
from typing import Any

from folovllm.entrypoints.openai.sse import EventStream
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_server import ToyServer, play, text_of

# Line ends for str.splitlines, and plain text in an event stream.
NO_LINE_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
LINES = ["", "a", " the", "  two", "data: x", ":", "x: y", "é", "你好", "😀", "[DONE]", f"a{NO_LINE_ENDS}b", "\ufeff"]
NO_EVENTS = [": keep-alive", "event: delta", "id: 7", "retry: 10", "dataset: no", ":"]


def prediction() -> str:
    stream = EventStream()
    events = [stream.feed(chunk) for chunk in (b"data: a\r", b"\ndata: b\r\n\r", b"\ndata: c\n\n")]
    assert events == [[], ["a\nb"], ["c"]], "the example of the page"
    return f"{', '.join(str(len(e)) for e in events)}; {len(events[1][0].splitlines())} lines\n{events}"


def fed(cls: Any, chunks: list[bytes]) -> list[list[str]]:
    """What each call of feed returns."""
    stream = cls()
    return [stream.feed(chunk) for chunk in chunks]


def events_of(cls: Any, chunks: list[bytes]) -> list[str]:
    """All events that feed returns."""
    return [event for events in fed(cls, chunks) for event in events]


# ---- encode


@check("unit", spec="R8.40", hint=1)
def an_event_is_a_data_line_and_an_empty_line(mine: Mine) -> None:
    """A text of one line becomes `data: `, the text in UTF-8, and two line feeds."""
    for data in ('{"text": "The"}', "[DONE]", "  你 😀"):
        got, expected = mine.cls().encode(data), f"data: {data}\n\n".encode()
        assert got == expected, f"encode({data!r}) returned {got!r}, expected {expected!r}: clients look for that"


@check("unit", spec="R8.40", hint=2)
def every_line_gets_a_data_line(mine: Mine) -> None:
    """A text of several lines must not end its own event, or begin another."""
    for data in ("one\ntwo", "one\r\ntwo", "one\rtwo"):
        got, expected = mine.cls().encode(data), b"data: one\ndata: two\n\n"
        assert got == expected, f"encode({data!r}) returned {got!r}, expected {expected!r}"
    for data in ("bye\n\ndata: [DONE]", "bye\r\rdata: [DONE]", "\n", "\r\n\n"):
        wire = mine.cls().encode(data)
        got, expected = EventStream().feed(wire), [data.replace("\r\n", "\n").replace("\r", "\n")]
        assert got == expected, (
            f"encode({data!r}) returned {wire!r}, and a client reads {got} in it, expected {expected}: if "
            "a text has an empty line, it ends its own event, and what follows is read as events of the server"
        )


@check("unit", spec="R8.40", hint=1)
def encode_remembers_nothing(mine: Mine) -> None:
    """One object encodes all answers of a server, so an event does not depend on what was encoded or fed before."""
    frames = mine.cls()
    frames.feed(b"data: a\n")
    got = [frames.encode(data) for data in ("one\ntwo", "three", "one\ntwo")]
    expected = [b"data: one\ndata: two\n\n", b"data: three\n\n", b"data: one\ndata: two\n\n"]
    assert got == expected, f"one object encoded 'one\\ntwo', 'three', 'one\\ntwo' as {got}, expected {expected}"
    rest = frames.feed(b"\n")
    assert rest == ["a"], (
        f"feed(b'data: a\\n'), three calls of encode, and feed(b'\\n') returned {rest}, expected ['a']: encode changed "
        "what feed had kept"
    )


@check("unit", spec="R8.40", hint=3)
def other_separators_stay_in_the_line(mine: Mine) -> None:
    """Only CR and LF end a line. U+2028 and its relatives are characters like others."""
    data = f"a{NO_LINE_ENDS}b"
    got, expected = mine.cls().encode(data), f"data: {data}\n\n".encode()
    assert got == expected, f"encode({data!r}) returned {got!r}, expected {expected!r}: str.splitlines splits too much"


# ---- feed


@check("unit", spec="R8.41", hint=2)
def a_chunk_holds_any_number_of_events(mine: Mine) -> None:
    """Several events may come in one chunk, and one event in several chunks."""
    got = fed(mine.cls, [b"data: a\n\ndata: b\n\ndata: ", b"c", b"\n", b"\ndata: d\n"])
    expected = [["a", "b"], [], [], ["c"]]
    assert got == expected, (
        f"the chunks 'data: a⏎⏎data: b⏎⏎data: ', 'c', '⏎', '⏎data: d⏎' gave {got}, expected {expected}: a chunk is "
        "what "
        "the network delivers, and no event; 'd' is not complete"
    )


@check("unit", spec="R8.41", hint=2)
def lines_of_an_event_are_joined(mine: Mine) -> None:
    """The data of an event are all its data lines, joined with a line feed."""
    got = fed(mine.cls, [b"data: {\ndata: }\n\n", b"data: one\n", b"data:\ndata: three\n\n"])
    expected = [["{\n}"], [], ["one\n\nthree"]]
    assert got == expected, f"events of two and of three data lines gave {got}, expected {expected}"


@check("unit", spec="R8.41", hint=3)
def what_is_no_data_is_ignored(mine: Mine) -> None:
    """Comments and other fields are no data, one space after the colon goes, and the colon may be missing."""
    cases: list[tuple[str, list[str]]] = [
        (": keep-alive\n\n", []),
        ("event: delta\nid: 7\ndata: a\nretry: 10\n\n", ["a"]),
        (":data: no\ndataset: no\nadata: no\n data: no\ndata: yes\n\n", ["yes"]),
        ("data:a\n\ndata: a\n\ndata:  the\n\ndata: a \n\n", ["a", "a", " the", "a "]),
        ("data: a: b\n\n", ["a: b"]),
        ("data: a\n: keep-alive\n:\ndata: b\n\n", ["a\nb"]),
        ("data\n\ndata:\n\ndata\ndata\n\n", ["", "", "\n"]),
        ("\n\n\ndata: a\n\n\n\n", ["a"]),
    ]
    for text, expected in cases:
        (got,) = fed(mine.cls, [text.encode()])
        assert got == expected, f"feed({text.encode()!r}) returned {got}, expected {expected}"


@check("unit", spec="R8.41", hint=1)
def a_character_may_be_cut(mine: Mine) -> None:
    """A character of several bytes may lie in two chunks."""
    wire = "data: 你😀é\n\n".encode()
    for i in range(len(wire)):
        got = events_of(mine.cls, [wire[:i], wire[i:]])
        assert got == ["你😀é"], (
            f"{wire!r} cut after {i} bytes gave {got}, expected ['你😀é']: a chunk that is decoded by itself loses a "
            "character at its end"
        )


@check("unit", spec="R8.41", hint=3)
def all_three_line_ends_count(mine: Mine) -> None:
    """A line ends with CR LF, with LF or with CR, and with nothing else."""
    for end in ("\n", "\r\n", "\r"):
        wire = f"data: a{end}data: b{end}{end}data: c{end}{end}".encode()
        (got,) = fed(mine.cls, [wire])
        assert got == ["a\nb", "c"], f"feed({wire!r}) returned {got}, expected ['a\\nb', 'c']"
    data = f"a{NO_LINE_ENDS}b"
    (got,) = fed(mine.cls, [f"data: {data}\n\n".encode()])
    assert got == [data], (
        f"an event with the text {data!r} gave {got}: str.splitlines, httpx's iter_lines and text files also split at "
        "characters that are no line end here, and the JSON of the event is torn"
    )


@check("unit", spec="R8.41", hint=3)
def a_cr_and_its_lf_may_be_cut(mine: Mine) -> None:
    """A LF at the beginning of a chunk belongs to the CR at the end of the one before, also across an empty chunk."""
    for chunks in ([b"data: a\r", b"\ndata: b\r\n\r\n"], [b"data: a\r", b"", b"\ndata: b\r\n\r\n"]):
        got = events_of(mine.cls, chunks)
        assert got == ["a\nb"], (
            f"the chunks {chunks} gave {got}, expected ['a\\nb']: CR and LF are one line end, and two would be an "
            "empty "
            "line, which ends the event"
        )


@check("unit", spec="R8.41", hint=3)
def a_lf_belongs_to_a_cr_directly_before_it(mine: Mine) -> None:
    """A LF that comes after other bytes ends a line of its own, however many CRs came before."""
    for chunks in ([b"data: a\r", b"data: b\n\n"], [b"\rdata: a\n", b"data: b\n\n"]):
        got = events_of(mine.cls, chunks)
        assert got == ["a\nb"], (
            f"the chunks {chunks} gave {got}, expected ['a\\nb']: between the CR and the LF are other bytes, so each "
            "ends a line"
        )


@check("unit", spec="R8.41", hint=2)
def bytes_that_are_no_utf8_are_replaced(mine: Mine) -> None:
    """A broken byte costs one character, and neither the event nor the connection."""
    for wire in (b"data: a\xffb\n\ndata: c\n\n", b"data: a\xe4\xbdb\n\ndata: c\n\n"):
        try:
            got = events_of(mine.cls, [wire])
        except UnicodeDecodeError as error:
            raise AssertionError(f"feed({wire!r}) raised {error}: one wrong byte ends the whole answer") from None
        assert got == ["a\ufffdb", "c"], f"feed({wire!r}) returned {got}, expected ['a\\ufffdb', 'c']"


@check("unit", spec="R8.41", hint=3)
def an_event_is_not_held_back(mine: Mine) -> None:
    """A CR ends its line at once, so an event is returned without waiting for what comes next."""
    got = fed(mine.cls, [b"data: a\r\n\r", b"\ndata: b\r\r", b"data: c\r\r"])
    assert got == [["a"], ["b"], ["c"]], (
        f"the chunks 'data: a\\r\\n\\r', '\\ndata: b\\r\\r', 'data: c\\r\\r' gave {got}, expected [['a'], ['b'], "
        "['c']]: "
        "if the event waits for the byte behind it, every token is shown late, and the last one never"
    )


@check("unit", spec="R8.41", hint=1)
def a_byte_order_mark_is_skipped_once(mine: Mine) -> None:
    """Some servers begin with a byte order mark, which may be cut as well. Later it is a character like others."""
    for chunks in ([b"\xef\xbb\xbfdata: a\n\n"], [b"\xef", b"\xbb\xbfda", b"ta: a\n\n"]):
        chunks = [*chunks, b"data: ", b"\xef\xbb\xbfb\n\n"]
        got = events_of(mine.cls, chunks)
        assert got == ["a", "\ufeffb"], (
            f"the chunks {chunks} gave {got}, expected ['a', '\\ufeffb']: only a mark at the very beginning goes"
        )


# ---- any stream, any cut


@check("property", spec="R8.41", hint=2)
def any_cut_gives_the_same_events(mine: Mine) -> None:
    """Random streams with all line ends, fields and comments, cut in random places: the events are always the same."""
    rng = random.Random(0)
    for size in range(1, 120):
        wire, expected = random_stream(rng, 1 + size // 12)
        places = sorted(rng.choices(range(len(wire) + 1), k=rng.randint(0, 1 + size // 4)))
        chunks = [wire[a:b] for a, b in zip([0, *places], [*places, len(wire)], strict=True)]
        got = events_of(mine.cls, chunks)
        assert got == expected, f"the chunks {chunks} gave {got}, expected {expected}"


def random_stream(rng: random.Random, num_events: int) -> tuple[bytes, list[str]]:
    """The bytes of a stream and the data of its events. An event of zero lines is none."""
    text, events = "", []
    for _ in range(num_events):
        lines = rng.choices(LINES, k=rng.choice((0, 1, 1, 1, 2, 3)))
        written = [f"data:{'' if line[:1] not in ('', ' ') and rng.random() < 0.3 else ' '}{line}" for line in lines]
        for no_event in rng.choices(NO_EVENTS, k=rng.choice((0, 0, 1, 2))):
            written.insert(rng.randint(0, len(written)), no_event)
        end = rng.choice(("\n", "\r\n", "\r"))
        text += "".join(line + end for line in [*written, ""])
        events += ["\n".join(lines)] if lines else []
    return text.encode(), events


@check("property", spec="R8.41", hint=2)
def what_is_encoded_is_read(mine: Mine) -> None:
    """Any text that your server encodes comes out of your client, byte by byte. Its line ends become line feeds."""
    rng = random.Random(1)
    for size in range(1, 40):
        data = "".join(rng.choices([*LINES, "\n", "\r", "\r\n"], k=size // 3))
        wire = mine.cls().encode(data)
        got = events_of(mine.cls, [wire[i : i + 1] for i in range(len(wire))])
        expected = [data.replace("\r\n", "\n").replace("\r", "\n")]
        assert got == expected, f"encode({data!r}) returned {wire!r}, and byte by byte feed made {got} of it"


# ---- the scene: three answers over a real socket


@check("engine", spec="R8.41", hint=2)
def three_clients_read_their_answers(mine: Mine) -> None:
    """The toy engine answers three clients over a socket that delivers a few bytes at a time."""
    answers = play(stream_over_a_socket(mine))
    for name, (got, expected) in answers.items():
        assert got == expected, (
            f"client {name} read {len(got)} events, {got[-3:]} at the end; the server sent {len(expected)}, "
            f"{expected[-3:]} at the end"
        )


async def stream_over_a_socket(mine: Mine) -> dict[str, tuple[list[str], list[str]]]:
    """Client -> (the events that it read, the data that were sent to it)."""
    toy, sent, errors = ToyServer(), dict[str, list[str]](), list[Exception]()
    streams = {name: toy.open(name, max_tokens=12) for name in "abc"}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = (await reader.readexactly(1)).decode()
        try:
            await send(name, writer)
        except Exception as error:
            errors.append(error)
        finally:
            writer.close()

    async def send(name: str, writer: asyncio.StreamWriter) -> None:
        frames, sent[name] = mine.cls(), []
        async for output in streams[name]:
            text = f"{name}: {text_of(output.outputs[0].token_ids)}你\u2028\n😀"
            for data in (json.dumps({"text": text}, ensure_ascii=False), text):
                sent[name].append(data)
                writer.write(frames.encode(data))
        sent[name].append("[DONE]")
        writer.write(frames.encode("[DONE]"))

    async def client(name: str, num_bytes: int) -> list[str]:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        writer.write(name.encode())
        stream, events = mine.cls(), list[str]()
        while chunk := await reader.read(num_bytes):
            events += stream.feed(chunk)
        writer.close()
        return events

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        got = await asyncio.gather(toy.serve(), *(client(name, n) for name, n in zip("abc", (1, 7, 64), strict=True)))
    for error in errors:
        raise error
    return {name: (events, sent[name]) for name, events in zip("abc", got[1:], strict=True)}


# ---- memory


@check("counters", spec="R8.41", hint=1)
def nothing_is_kept_of_what_was_delivered(mine: Mine) -> None:
    """After a thousand events the object holds no more than after the first: streams run for hours."""
    stream, sizes = mine.cls(), []
    for _ in range(1000):
        stream.feed(b'data: {"text": "a token"}\n\n')
        sizes.append(characters_held(vars(stream)))
    assert sizes[-1] <= sizes[0] + 100, (
        f"after 1 event the object holds {sizes[0]} characters, after 1000 events {sizes[-1]}: what was returned is "
        "still there"
    )


def characters_held(value: Any) -> int:
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    if hasattr(value, "getvalue"):  # io.StringIO, io.BytesIO
        return len(value.getvalue())
    if isinstance(value, dict):
        return sum(map(characters_held, value.values()))
    return sum(map(characters_held, value)) if isinstance(value, (list, tuple, set)) else 0
