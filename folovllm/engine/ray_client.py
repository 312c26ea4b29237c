"""RayCoreClient: the engine core's loop as a Ray actor, on this machine or on another.

Milestone: M10. vLLM counterpart: `CoreEngineActorManager` in vllm/v1/engine/utils.py, whose actors still talk over zmq.
Left out: zmq beside Ray, placement groups that are given from outside.

    event loop --send()--> queue --writer thread--> put(messages) --> the actor's inbox
    event loop <--call_soon_threadsafe-- reader thread <-- take() waits in the actor until its loop has sent something

At most one `put` and one `take` are on their way. So messages keep their order, and those that gather meanwhile travel
together. A `take` that finds nothing answers after TAKE_SECONDS: if there is no answer long after that, the actor's
machine is gone. If the process of the actor ends, Ray says so at once.

Row 3, without torch: the front end's process does not import it.
"""

import atexit
import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.distributed.ray_cluster import (
    ENGINE_ALONE,
    Place,
    bundle_of,
    cause_of,
    import_ray,
    join_cluster,
    num_cpus_of,
)
from folovllm.engine.core import EngineCore
from folovllm.engine.core_client import MAX_UNDELIVERED, CoreClient
from folovllm.engine.core_loop import describe
from folovllm.engine.messages import Dead, DownMessage, StartFailed, Stop, UpMessage
from folovllm.engine.start_core import ExecutorFactory, QueueInbox, build_core, run_core
from folovllm.parts import load_part

logger = logging.getLogger(__name__)

TAKE_SECONDS = 5.0  # how long `take` waits for a message
ANSWER_SECONDS = 60.0  # until an actor that does not answer at all counts as dead; loading a model may hold it up


class EngineActor:
    """The actor: the loop runs in a thread, and two others handle `put` and `take`."""

    def __init__(self, config: EngineConfig, model_path: Path, executor_factory: ExecutorFactory | None = None) -> None:
        load_part("core.request", config.parts)  # a class from a learner's file must be loaded before one is unpickled
        self._inbox = QueueInbox()
        self._outbox: queue.Queue[UpMessage | None] = queue.Queue(MAX_UNDELIVERED)  # a full one makes the engine wait
        self._is_over = False  # nothing comes into the outbox any more
        make_core = functools.partial(build_core, config, model_path, executor_factory)
        threading.Thread(target=self._run, args=(make_core,), name="folovllm-engine", daemon=True).start()

    def _run(self, make_core: Callable[[], EngineCore]) -> None:
        run_core(make_core, self._inbox, self._outbox.put)
        self._outbox.put(None)

    def put(self, messages: list[DownMessage]) -> None:
        """Hands messages to the loop."""
        for message in messages:
            self._inbox.put(message)

    def take(self, seconds: float) -> list[UpMessage] | None:
        """What the loop has sent since the last call. It waits up to `seconds` for something. None: it is over."""
        if self._is_over:
            return None
        messages: list[UpMessage] = []
        with contextlib.suppress(queue.Empty):
            message = self._outbox.get(timeout=seconds)
            while message is not None:
                messages.append(message)
                message = self._outbox.get_nowait()
            self._is_over = True
        return messages


class RayCoreClient(CoreClient):
    """One engine in an actor of its own. Raises ValueError if Ray is not installed."""

    def __init__(self, config: EngineConfig, model_path: Path, executor_factory: ExecutorFactory | None = None) -> None:
        super().__init__()
        self._ray = import_ray("data_parallel_backend='ray'")
        self._config, self._arguments = config, (config, model_path, executor_factory)
        self._outbox: queue.SimpleQueue[DownMessage | None] = queue.SimpleQueue()
        self._place: Place | None = None
        self._actor: Any = None
        self._main = threading.Thread(target=self._run, name="folovllm-ray-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="folovllm-ray-writer", daemon=True)

    def launch(self) -> None:
        atexit.register(self.close, timeout=1.0)  # before Ray's own: last in, first out
        self._main.start()

    def send(self, message: DownMessage) -> None:
        self._outbox.put(message)

    def close(self, timeout: float = 10.0) -> None:
        atexit.unregister(self.close)
        self._is_closing = True
        self.send(Stop())
        self._outbox.put(None)
        if self._main.ident is not None:
            self._main.join(timeout)
        self._kill()

    def _kill(self) -> None:
        """Ends the actor's process, and gives its CPUs and GPUs back."""
        if self._actor is not None:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.kill(self._actor, no_restart=True)
        if self._place is not None:
            self._place.close()

    # ---- the writer thread

    def _write(self) -> None:
        """Sends what waits, all of it in one call, and waits until the actor has it."""
        with contextlib.suppress(Exception):  # the actor is dead: the reader says so
            while (message := self._outbox.get()) is not None:
                messages, is_last = self._with_waiting(message)
                self._ray.get(self._actor.put.remote(messages), timeout=ANSWER_SECONDS)
                if is_last:
                    return

    def _with_waiting(self, first: DownMessage) -> tuple[list[DownMessage], bool]:
        """`first` and what waits behind it, and whether the end of the outbox is among that."""
        messages: list[DownMessage] = [first]
        with contextlib.suppress(queue.Empty):
            while (message := self._outbox.get_nowait()) is not None:
                messages.append(message)
            return messages, True
        return messages, False

    # ---- the reader thread

    def _run(self) -> None:
        """Starts the actor, and takes what its loop sends until it is over."""
        try:
            self._start_actor()
        except Exception as error:
            is_user_error = isinstance(error, ValueError)
            self._deliver(StartFailed(str(error) if is_user_error else describe(error), is_user_error))
            return
        self._writer.start()
        try:
            while (messages := self._fetch()) is not None:
                for message in messages:
                    self._deliver(message)
        except Exception as error:
            if not self._is_closing:
                logger.error("the engine's actor does not answer any more: %s", error)
                self._deliver(Dead(cause_of(error)))

    def _start_actor(self) -> None:
        parallel = self._config.parallel_config
        join_cluster(parallel.ray_address, num_cpus_of(self._config))
        has_ranks = parallel.executor_backend != "ray"  # otherwise they are actors, with places of their own
        bundle = bundle_of(self._ray, self._config, parallel.world_size) if has_ranks else ENGINE_ALONE
        self._place = Place(self._ray, [bundle])
        self._actor = self._place.start_actor(0, EngineActor, *self._arguments, max_concurrency=2)
        if self._is_closing:  # meanwhile
            self._kill()

    def _fetch(self) -> list[UpMessage] | None:
        messages: list[UpMessage] | None = self._ray.get(
            self._actor.take.remote(TAKE_SECONDS), timeout=TAKE_SECONDS + ANSWER_SECONDS
        )
        return messages
