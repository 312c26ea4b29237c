"""Server-sent events: what is encoded comes back, however the bytes are cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.entrypoints.openai.sse import DONE, EventStream

pytestmark = pytest.mark.m8

# A line may end in three ways, and a chunk may end in the middle of each. U+2028, \x0b and \x85 end no line here.
DATA = st.text(alphabet=st.sampled_from("ab:\r\n 你😀\u2028\x0b\x85\ufeff"), max_size=12)


def parse(stream: bytes, cuts: list[int] | None = None) -> list[str]:
    """The events of a stream that arrives in pieces, cut at `cuts`."""
    places = [0, *sorted(cut % (len(stream) + 1) for cut in cuts or []), len(stream)]
    parser = EventStream()
    return [event for a, b in itertools.pairwise(places) for event in parser.feed(stream[a:b])]


def unix_lines(data: str) -> str:
    return data.replace("\r\n", "\n").replace("\r", "\n")


@given(st.lists(DATA, max_size=5), st.lists(st.integers(min_value=0), max_size=12))
def test_what_is_encoded_comes_back_in_any_cut(events, cuts):
    encoder = EventStream()
    stream = b"".join(map(encoder.encode, events))
    assert parse(stream, cuts) == [unix_lines(data) for data in events]


@given(st.binary(max_size=60), st.lists(st.integers(min_value=0), max_size=12))
def test_any_bytes_give_the_same_events_in_any_cut(stream, cuts):
    assert parse(stream, cuts) == parse(stream)
    assert parse(stream, list(range(len(stream)))) == parse(stream)


LINES = st.sampled_from(["data: a", "data:b", "data", "data:  c", ": comment", "", "", "event: x", "id: 1", "datax: d"])


@given(st.lists(LINES, max_size=12), st.sampled_from(["\n", "\r", "\r\n"]), st.lists(st.integers(0), max_size=12))
def test_lines_mean_what_the_standard_says(lines, end, cuts):
    expected, data = [], []
    for line in lines:
        if line == "":
            if data:
                expected.append("\n".join(data))
            data = []
        elif line == "data" or line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
    assert parse("".join(line + end for line in lines).encode(), cuts) == expected


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: one\n\ndata: two\n\n", ["one", "two"]),
        (b"data: one\r\rdata: two\r\n\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfdata: after a byte order mark\n\n", ["after a byte order mark"]),
        (b"data: \xef\xbb\xbfkept\n\n", ["\ufeffkept"]),
        (b": keep-alive\n\ndata: x\n\n", ["x"]),
        (b"event: delta\nid: 7\nretry: 10\ndata: x\n\n", ["x"]),
        (b"data\n\n", [""]),
        (b"data:\ndata:\n\n", ["\n"]),
        (b"data: unfinished\n", []),
        (b"data: \xe4\xbd broken\n\n", ["\ufffd broken"]),
    ],
)
def test_examples(stream, events):
    assert parse(stream) == events


def test_an_event_that_ends_with_two_carriage_returns_is_delivered_at_once():
    """The second one may be the first half of \\r\\n; waiting for the rest would hold back the event until the next."""
    parser = EventStream()
    assert parser.feed(b"data: now\r\r") == ["now"]
    assert parser.feed(b"\ndata: next\r\n\r\n") == ["next"]


def test_an_unfinished_event_is_kept():
    parser = EventStream()
    assert parser.feed("data: 你".encode()[:-1]) == []
    assert parser.feed("你".encode()[-1:] + b"\n") == []
    assert parser.feed(b"\n") == ["你"]


def test_json_stays_on_one_line():
    assert EventStream().encode(json.dumps({"text": "a\nb"})) == b'data: {"text": "a\\nb"}\n\n'
    assert EventStream().encode(DONE) == b"data: [DONE]\n\n"


def test_a_line_of_a_megabyte_in_small_chunks_takes_no_quadratic_time():
    """Joining the pieces anew for each chunk would copy 80 GB."""
    parser, piece = EventStream(), b"x" * 16
    assert parser.feed(b"data: ") == []
    for _ in range(2**16):
        parser.feed(piece)
    (event,) = parser.feed(b"\n\n")
    assert len(event) == 2**20
