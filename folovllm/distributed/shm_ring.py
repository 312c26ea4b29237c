"""RingWriter, RingReader: a message is written once into shared memory, and several processes read it there.

Milestone: M9. vLLM counterparts: ShmRingBuffer, MessageQueue (vllm/distributed/device_communicators/shm_broadcast.py).
Left out: readers on other machines (zmq sockets there), tensors out of band.

The memory holds slots that are used in turn, and one counter for each process. Only its own process changes a counter,
so there is no lock. E.g. 4 slots and 2 readers:

    written = 6    slots written since the start; the last one is in slot 5 % 4 = 1
    read[0] = 6    reader 0 has copied all of them
    read[1] = 3    reader 1 has slots 3 % 4 = 3, 4 % 4 = 0 and 5 % 4 = 1 before it
    room for the writer: 6 - min(6, 3) = 3 slots are in use, so slot 6 % 4 = 2 is free, and then the writer waits

A message that is longer than a slot takes several, of which the first and the last are marked.

A reader with nothing to read looks at `written` again and again for a short time, and then sleeps on its doorbell, a
pipe into which the writer puts a byte if the reader's flag says that it sleeps. So an idle engine needs no processor.
Memory and pipes have no names: the kernel frees them with the last process that has them open, however it ends.
"""

import contextlib
import mmap
import os
import select
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

SLOT_BYTES, NUM_SLOTS = 64 * 1024, 16
SPIN_SECONDS = 100e-6  # how long a reader looks before it sleeps: about as long as waking up takes
SLEEP_SECONDS = 1.0  # the longest sleep without a look at the counter
WAIT_SECONDS = 200e-6  # between two looks of a writer that waits for room
FIRST, LAST = 1, 2  # flags of a slot
WORD, LINE = 8, 8  # bytes of a number; numbers in a cache line, which two processes should not both write to


@dataclass(frozen=True)
class RingEnd:
    """What a reader needs: two descriptors that its process has inherited, and the shape of the ring."""

    reader: int
    num_readers: int
    memory: int  # descriptor of the shared memory
    doorbell: int  # descriptor: the end of the pipe to read from
    slot_bytes: int = SLOT_BYTES
    num_slots: int = NUM_SLOTS


class RingMemory:
    """The shared memory: counters, flags, the header of each slot, and the slots."""

    def __init__(self, descriptor: int, num_readers: int, slot_bytes: int, num_slots: int) -> None:
        self.num_readers, self.slot_bytes, self.num_slots = num_readers, slot_bytes, num_slots
        num_words = LINE * (1 + num_readers) + num_slots
        self._map = mmap.mmap(descriptor, ring_bytes(num_readers, slot_bytes, num_slots))
        self._bytes = memoryview(self._map)
        # A number of this view is read and written by one machine instruction. struct would go byte by byte.
        self._words = self._bytes[: num_words * WORD].cast("Q")
        self._headers = LINE * (1 + num_readers)
        self._slots = num_words * WORD

    @property
    def written(self) -> int:
        return self._words[0]

    @written.setter
    def written(self, count: int) -> None:
        self._words[0] = count

    def read(self, reader: int) -> int:
        return self._words[LINE * (1 + reader)]

    def set_read(self, reader: int, count: int) -> None:
        self._words[LINE * (1 + reader)] = count

    def is_asleep(self, reader: int) -> bool:
        return self._words[LINE * (1 + reader) + 1] == 1

    def set_asleep(self, reader: int, asleep: bool) -> None:
        self._words[LINE * (1 + reader) + 1] = int(asleep)

    def put(self, count: int, part: memoryview, flags: int) -> None:
        """Fills the slot that is the `count`-th to be written."""
        slot = count % self.num_slots
        start = self._slots + slot * self.slot_bytes
        self._bytes[start : start + len(part)] = part
        self._words[self._headers + slot] = len(part) << 2 | flags

    def get(self, count: int) -> tuple[bytes, int]:
        """A copy of what `put` put there, and its flags."""
        slot = count % self.num_slots
        header = self._words[self._headers + slot]
        start = self._slots + slot * self.slot_bytes
        return bytes(self._bytes[start : start + (header >> 2)]), header & 3

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()


def ring_bytes(num_readers: int, slot_bytes: int, num_slots: int) -> int:
    return (LINE * (1 + num_readers) + num_slots) * WORD + num_slots * slot_bytes


def nameless_memory(num_bytes: int) -> int:
    """A descriptor of zeroed memory without a name. Raises OSError if there is no room for it.

    The room is taken at once: otherwise a full disk or a full /dev/shm would kill the process that writes (SIGBUS).
    """
    if hasattr(os, "memfd_create"):  # Linux
        descriptor = os.memfd_create("folovllm-ring")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.truncate(descriptor, num_bytes)
    except OSError as error:
        os.close(descriptor)
        raise OSError(
            error.errno, f"no room for {num_bytes / 2**20:.1f} MiB of shared memory: {error.strerror}"
        ) from None
    return descriptor


_FENCE = threading.Lock()


def _fence() -> None:
    """What this process wrote before is visible to the others before it reads on.

    A processor may otherwise read ahead of its own writes: the reader would miss the new message, and the writer that
    the reader sleeps. Taking and releasing a lock prevents it.
    """
    with _FENCE:
        pass


class RingWriter:
    """The one process that writes. It makes the ring."""

    def __init__(self, num_readers: int, slot_bytes: int = SLOT_BYTES, num_slots: int = NUM_SLOTS) -> None:
        descriptor = nameless_memory(ring_bytes(num_readers, slot_bytes, num_slots))
        self._memory = RingMemory(descriptor, num_readers, slot_bytes, num_slots)
        pipes = [os.pipe() for _ in range(num_readers)]  # (end to read, end to write)
        self._ends = [
            RingEnd(reader, num_readers, descriptor, doorbell, slot_bytes, num_slots)
            for reader, (doorbell, _) in enumerate(pipes)
        ]
        self._bells = [bell for _, bell in pipes]
        for bell in self._bells:
            os.set_blocking(bell, False)

    def end(self, reader: int) -> RingEnd:
        """The end of a reader, whose process must inherit the two descriptors in it."""
        return self._ends[reader]

    def close_ends(self) -> None:
        """Closes what only the readers need, when their processes have inherited it. Idempotent."""
        for descriptor in {end.memory for end in self._ends} | {end.doorbell for end in self._ends}:
            os.close(descriptor)
        self._ends = []

    def send(self, message: bytes, timeout: float, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Writes a message for all readers. Raises TimeoutError if a reader has left no room for it in `timeout` s.

        `while_waiting` is called now and then, and may raise. If anything raises in the middle of a message, the
        readers drop its beginning when the next message begins.
        """
        deadline = time.monotonic() + timeout
        rest, flags = memoryview(message), FIRST
        while True:
            part, rest = rest[: self._memory.slot_bytes], rest[self._memory.slot_bytes :]
            self._wait_for_room(deadline, while_waiting)
            written = self._memory.written
            self._memory.put(written, part, flags if rest else flags | LAST)
            _fence()  # the slot is complete before the counter says so
            self._memory.written = written + 1
            self._ring_bells()
            if not rest:
                return
            flags = 0

    def _wait_for_room(self, deadline: float, while_waiting: Callable[[], None]) -> None:
        memory = self._memory
        while memory.written - min(map(memory.read, range(memory.num_readers))) >= memory.num_slots:
            while_waiting()
            if time.monotonic() > deadline:
                slow = [i for i in range(memory.num_readers) if memory.written - memory.read(i) >= memory.num_slots]
                raise TimeoutError(f"the ring is full: no message was taken by reader {', '.join(map(str, slow))}")
            time.sleep(WAIT_SECONDS)

    def _ring_bells(self) -> None:
        _fence()  # the counter is written before the flags are read
        for reader, bell in enumerate(self._bells):
            if self._memory.is_asleep(reader):
                # A full pipe wakes the reader as well, and a reader that has gone needs no bell.
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(bell, b"\0")

    def close(self) -> None:
        """A reader that waits gets EOFError."""
        self.close_ends()
        for bell in self._bells:
            os.close(bell)
        self._memory.close()


class RingReader:
    """One of the processes that read."""

    def __init__(self, end: RingEnd) -> None:
        self._reader, self._doorbell = end.reader, end.doorbell
        self._memory = RingMemory(end.memory, end.num_readers, end.slot_bytes, end.num_slots)
        self._poll = select.poll()
        self._poll.register(end.doorbell, select.POLLIN)
        self._num_read = 0
        self._parts: list[bytes] = []  # of a message whose last slot has not come yet

    def receive(self, timeout: float | None = None) -> bytes:
        """Waits for the next message. Raises EOFError if the writer has gone, TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._wait(deadline)
            part, flags = self._memory.get(self._num_read)
            _fence()  # the slot is copied before the counter frees it
            self._num_read += 1
            self._memory.set_read(self._reader, self._num_read)
            if flags & FIRST:
                self._parts = []
            self._parts.append(part)
            if flags & LAST:
                message, self._parts = b"".join(self._parts), []
                return message

    def _wait(self, deadline: float | None) -> None:
        """Waits until a slot is written."""
        if self._memory.written > self._num_read:
            return
        sleep_at = time.monotonic() + SPIN_SECONDS
        while self._memory.written == self._num_read:
            now = time.monotonic()
            if deadline is not None and now > deadline:
                raise TimeoutError("no message came")
            if now < sleep_at:
                time.sleep(0)  # another thread or process may run
            else:
                self._sleep(SLEEP_SECONDS if deadline is None else min(SLEEP_SECONDS, deadline - now))

    def _sleep(self, seconds: float) -> None:
        """Sleeps until the bell rings, at most `seconds`."""
        self._memory.set_asleep(self._reader, True)
        _fence()  # the flag is written before the counter is read
        try:
            if self._memory.written > self._num_read or not self._poll.poll(max(seconds, 0.0) * 1000):
                return
            if not os.read(self._doorbell, 64):
                raise EOFError("the writer has gone")
        finally:
            self._memory.set_asleep(self._reader, False)

    def close(self) -> None:
        self._memory.close()
