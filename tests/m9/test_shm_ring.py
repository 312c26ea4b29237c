"""The ring: one writer, several readers, long messages, sleeping and slow readers, ends."""

import errno
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from folovllm.distributed import shm_ring
from folovllm.distributed.shm_ring import RingReader, RingWriter

pytestmark = pytest.mark.m9

TIMEOUT = 30.0  # no test waits for it unless it fails
SLOT, SLOTS = 64, 4


@pytest.fixture
def ring() -> Iterator[tuple[RingWriter, list[RingReader]]]:
    """A small ring with two readers in this process."""
    before = descriptors()
    writer = RingWriter(2, SLOT, SLOTS)
    readers = [RingReader(writer.end(i)) for i in range(2)]
    yield writer, readers
    writer.close()
    for reader in readers:
        reader.close()
    assert descriptors() == before


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def in_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def messages(count: int, longest: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.randint(0, longest)) for _ in range(count)]


@pytest.mark.parametrize("size", [0, 1, SLOT - 1, SLOT, SLOT + 1, 3 * SLOT, SLOT * SLOTS, 10 * SLOT * SLOTS + 5])
def test_a_message_of_any_length_reaches_all_readers(ring, size):
    writer, readers = ring
    message = random.Random(size).randbytes(size)
    sender = in_thread(lambda: [writer.send(message, TIMEOUT), writer.send(b"next", TIMEOUT)])
    got: list[list[bytes]] = [[], []]
    takers = [in_thread(lambda i=i: got[i].extend(readers[i].receive(TIMEOUT) for _ in range(2))) for i in range(2)]
    for thread in [sender, *takers]:
        thread.join(TIMEOUT)
    assert got == [[message, b"next"]] * 2


READER = """
import hashlib, sys
from folovllm.distributed.shm_ring import RingEnd, RingReader
reader, seen = RingReader(RingEnd(*map(int, sys.argv[1:]))), hashlib.sha256()
try:
    while True:
        message = reader.receive()
        seen.update(len(message).to_bytes(8, "big") + message)
except EOFError:
    print(seen.hexdigest())
"""


def test_processes_read_what_was_written_and_end_with_the_writer():
    """3,000 messages through 4 small slots, so that readers and writer wait for each other all the time."""
    import hashlib

    writer, processes = RingWriter(3, SLOT, SLOTS), []
    for i in range(3):
        end = writer.end(i)
        arguments = map(str, (end.reader, end.num_readers, end.memory, end.doorbell, end.slot_bytes, end.num_slots))
        command = [sys.executable, "-c", READER, *arguments]
        inherited = (end.memory, end.doorbell)
        processes.append(subprocess.Popen(command, pass_fds=inherited, stdout=subprocess.PIPE, text=True))
    writer.close_ends()
    expected, rng = hashlib.sha256(), random.Random(1)
    for message in messages(3000, 4 * SLOT):
        if rng.random() < 0.01:
            time.sleep(0.002)  # long enough for the readers to fall asleep
        writer.send(message, TIMEOUT)
        expected.update(len(message).to_bytes(8, "big") + message)
    writer.close()
    assert [process.communicate(timeout=TIMEOUT)[0].strip() for process in processes] == [expected.hexdigest()] * 3


def test_a_reader_that_takes_nothing_is_named_and_loses_nothing(ring):
    writer, readers = ring
    for i in range(SLOTS):
        writer.send(bytes([i]), TIMEOUT)
    assert [readers[0].receive(TIMEOUT) for _ in range(SLOTS)] == [bytes([i]) for i in range(SLOTS)]
    with pytest.raises(TimeoutError, match=r"no message was taken by reader 1$"):
        writer.send(b"too much", 0.05)
    assert [readers[1].receive(TIMEOUT) for _ in range(SLOTS)] == [bytes([i]) for i in range(SLOTS)]
    writer.send(b"more", TIMEOUT)
    assert [reader.receive(TIMEOUT) for reader in readers] == [b"more"] * 2


def test_the_beginning_of_an_interrupted_message_is_dropped(ring):
    """Ctrl-C or a dead rank ends a wait for room in the middle of a long message."""
    writer, readers = ring

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.send(bytes(10 * SLOT * SLOTS), TIMEOUT, while_waiting=interrupt)
    with pytest.raises(TimeoutError):
        readers[0].receive(0.05)
    with pytest.raises(TimeoutError):
        readers[1].receive(0.05)
    writer.send(b"whole", TIMEOUT)
    assert [reader.receive(TIMEOUT) for reader in readers] == [b"whole"] * 2


def test_a_waiting_reader_needs_no_processor(ring):
    """An engine may be idle for days."""
    _, readers = ring
    before = time.thread_time()
    with pytest.raises(TimeoutError):
        readers[0].receive(0.5)
    assert time.thread_time() - before < 0.1


def test_a_bell_that_is_missed_delays_a_message_and_does_not_lose_it(ring, monkeypatch):
    writer, readers = ring
    monkeypatch.setattr(shm_ring, "SLEEP_SECONDS", 0.05)
    monkeypatch.setattr(writer, "_ring_bells", lambda: None)
    got: list[bytes] = []
    thread = in_thread(lambda: got.append(readers[0].receive(TIMEOUT)))
    while not writer._memory.is_asleep(0):
        time.sleep(0.001)
    writer.send(b"silent", TIMEOUT)
    thread.join(TIMEOUT)
    assert got == [b"silent"]


def test_the_bell_wakes_a_sleeping_reader(ring, monkeypatch):
    """Without the bell the message would wait for the end of the sleep."""
    writer, readers = ring
    monkeypatch.setattr(shm_ring, "SLEEP_SECONDS", 1000.0)
    got: list[bytes] = []
    thread = in_thread(lambda: got.append(readers[1].receive()))
    while not writer._memory.is_asleep(1):
        time.sleep(0.001)
    writer.send(b"awake", TIMEOUT)
    thread.join(TIMEOUT)
    assert got == [b"awake"]


def test_what_was_written_is_read_before_the_end():
    writer = RingWriter(1, SLOT, SLOTS)
    reader = RingReader(writer.end(0))
    writer.send(b"last words", TIMEOUT)

    os.close(writer._bells.pop())  # as when the writer's process ends
    assert reader.receive(TIMEOUT) == b"last words"
    with pytest.raises(EOFError, match="the writer has gone"):
        reader.receive(TIMEOUT)


@pytest.mark.parametrize("has_memfd", [True, False])
def test_the_memory_has_no_name(has_memfd, monkeypatch, tmp_path):
    """So nothing is left on the disk or in /dev/shm, however the processes end."""
    if not has_memfd:
        monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/dev/shm"))
    writer = RingWriter(1, SLOT, SLOTS)
    reader = RingReader(writer.end(0))
    writer.send(b"hello", TIMEOUT)
    assert reader.receive(TIMEOUT) == b"hello"
    assert list(tmp_path.iterdir()) == []
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "folovllm" in name}
    reader.close()
    writer.close()


FULL = """
import os, resource, tempfile
from folovllm.distributed.shm_ring import RingWriter
if {no_memfd}: del os.memfd_create
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
before = os.listdir("/proc/self/fd")
try:
    RingWriter(2)
except OSError as error:
    print(error.strerror)
assert os.listdir("/proc/self/fd") == before
"""


@pytest.mark.parametrize("no_memfd", [True, False])
def test_a_full_disk_is_an_error_at_start_and_no_later_death(no_memfd, tmp_path):
    """Memory that is taken only when it is written to would kill the writer with SIGBUS."""
    command = [sys.executable, "-c", FULL.format(no_memfd=no_memfd)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert done.stderr == "" and done.stdout.startswith("no room for 1.0 MiB of shared memory"), done
    assert list(tmp_path.iterdir()) == []


def test_the_errno_is_kept(monkeypatch):
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        RingWriter(2)
    assert caught.value.errno == errno.ENOSPC
