"""Builds the engine core and runs its loop: in a thread, or as the whole of a process.

Milestone: M8. vLLM counterpart: `EngineCoreProc.run_engine_core` in vllm/v1/engine/core.py.
Left out: handshakes over addresses, huge-page and NUMA settings of the process.

Row 3. torch is imported inside the functions that need it, because the front end's process imports this module too, to
name the process's main function, and must stay small.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.engine.core_loop import EngineCoreLoop, Inbox, describe
from folovllm.engine.messages import Dead, DownMessage, Heartbeat, Ready, StartFailed, Stop, UpMessage
from folovllm.executor.base import Executor
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.parts import load_part

logger = logging.getLogger(__name__)

ExecutorFactory = Callable[[EngineConfig], Executor]


def resolve_config(config: EngineConfig, arch: ModelArchitecture) -> EngineConfig:
    """The config with all that depends on the model and on this machine filled in. Imports torch."""
    from folovllm.platforms import choose_device, has_fast_bf16

    device = choose_device(config.device)
    if device == "cuda":
        logger.warning(
            "this engine runs on the GPU, where FoloVLLM is untried: device='cpu' (--device cpu) is the tested path, "
            "and `bash scripts/gpu_all.sh` measures what works on this GPU (docs/dev/gpu_status.md)"
        )
    resolved = config.resolve(arch, device, has_fast_bf16(device, config.kernel_config))
    if config.model_config.dtype == "auto" and resolved.model_config.dtype != arch.dtype:
        logger.warning(
            "running in float32, because bfloat16 would be slower: this processor has no instructions for it, and the "
            "C++ kernels, which need none, do not run here (dtype='bfloat16' forces it)"
        )
    return resolved


def build_core(config: EngineConfig, model_path: Path, executor_factory: ExecutorFactory | None = None) -> EngineCore:
    """The engine core for `config`. `executor_factory` replaces the model: then `config` must be resolved."""
    if executor_factory is not None:
        return EngineCore(config, executor_factory(config))
    from folovllm.executor.select import make_executor

    options = config.model_config
    config = resolve_config(config, load_hf_config(model_path, options.hf_overrides, options.generation_config))
    config = share_threads(config)
    executor = make_executor(config, model_path)
    try:
        return EngineCore(config, executor)
    except BaseException:
        executor.shutdown()  # its processes would outlive the engine
        raise


def share_threads(config: EngineConfig) -> EngineConfig:
    """Several engines on one machine share its cores: a thread too many on each core makes all of them slower.

    A single engine follows torch's number of threads, also if that changes later, unless this process may use fewer
    CPUs. The executor divides the threads of a single engine among its ranks.
    """
    parallel = config.parallel_config
    if config.cpu_threads is not None or config.device != "cpu":
        return config
    import torch

    from folovllm.platforms import default_threads

    num_threads, num_ranks = default_threads().number, parallel.num_local_engines * parallel.world_size
    if parallel.num_local_engines == 1 and (num_ranks > 1 or num_threads == torch.get_num_threads()):
        return config
    return dataclasses.replace(config, cpu_threads=max(1, num_threads // num_ranks))


def run_core(make_core: Callable[[], EngineCore], inbox: Inbox, send: Callable[[UpMessage], None]) -> None:
    """Makes the core, says that it is ready, and serves until it is stopped or dies. The last message says which."""
    try:
        core = make_core()
    except Exception as error:
        is_user_error = isinstance(error, ValueError)
        if not is_user_error:
            logger.exception("the engine could not be started")
        send(StartFailed(str(error) if is_user_error else describe(error), is_user_error))
        return
    try:
        send(Ready(core.config, core.kv_cache_config, core.executor.describe()))
        EngineCoreLoop(core, inbox, send).run()
    except BaseException as error:
        logger.exception("the engine is dead")
        send(Dead(describe(error)))
    finally:
        with contextlib.suppress(Exception):
            core.shutdown()


class QueueInbox:
    """The inbox of a loop that runs in a thread."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[DownMessage] = queue.SimpleQueue()

    def put(self, message: DownMessage) -> None:
        self._messages.put(message)

    def take(self, wait: bool, timeout: float | None = None) -> list[DownMessage]:
        messages: list[DownMessage] = []
        with contextlib.suppress(queue.Empty):
            if wait:
                messages.append(self._messages.get(timeout=timeout))
            while True:
                messages.append(self._messages.get_nowait())
        return messages


class PipeInbox:
    """The inbox of a loop that is a process. The end of the pipe is a Stop: the front end has gone."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def take(self, wait: bool, timeout: float | None = None) -> list[DownMessage]:
        messages: list[DownMessage] = []
        try:
            if wait and not self._connection.poll(timeout):
                return []
            while self._connection.poll():
                messages.append(self._connection.recv())
        except (EOFError, ConnectionError):
            messages.append(Stop())
        return messages


def run_core_process(
    connection: Connection, config: EngineConfig, model_path: Path, executor_factory: ExecutorFactory | None = None
) -> None:
    """The main function of the engine's process. It ends when the front end says so, or closes the pipe.

    Signals to stop are the front end's affair: Ctrl-C reaches all processes of a terminal, and a service manager sends
    SIGTERM to all processes of a service, but the open streams are to end in order. So this process ignores both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    load_part("core.request", config.parts)  # a class from a learner's file must be loaded before one is unpickled

    sending = threading.Lock()

    def send(message: UpMessage | Heartbeat) -> None:
        with sending, contextlib.suppress(ConnectionError):  # the front end has gone: the inbox will say so
            connection.send(message)

    seconds = config.parallel_config.heartbeat_seconds
    if seconds is not None:
        threading.Thread(target=send_heartbeats, args=(send, seconds), name="folovllm-heart", daemon=True).start()
    run_core(lambda: build_core(config, model_path, executor_factory), PipeInbox(connection), send)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: taking down an interpreter with torch takes a second, and several on a busy machine


def send_heartbeats(send: Callable[[Heartbeat], None], seconds: float) -> None:
    """A thread beside the loop, which cannot say anything in the middle of a step."""
    while True:
        time.sleep(seconds)
        send(Heartbeat())
