"""AsyncLLM: the engine behind a server. Many requests at once on one event loop, each with a stream of its own.

Milestone: M8. vLLM counterpart: vllm/v1/engine/async_llm.py.
Left out: LoRA, pooling, profiling, sleep mode.

    prompt --InputProcessor--> Request --AddRequests--> EngineCoreLoop (a process or a thread), one step after another
    RequestStream <--RequestOutputCollector <--OutputProcessor (open_requests.py) <--StepOutputs

This is LLMEngine cut in two: the front half (text, streams) runs here, the core runs elsewhere. A step never holds up
the event loop, and a slow reader or a long text never holds up a step. All methods belong to the thread of the event
loop. Row 3, but without torch: a test checks that the front end's process does not import it.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.engine.async_tokenizer import AsyncTokenizer, is_long
from folovllm.engine.core_client import CoreClient, EngineDeadError
from folovllm.engine.input_processor import InputProcessor, Prompt
from folovllm.engine.messages import Call, CallResult, Dead, Ready, StepOutputs, UpMessage
from folovllm.engine.open_requests import EngineObserver, OpenRequests, RequestFailedError
from folovllm.engine.request_stream import RequestStream
from folovllm.engine.select_client import make_core_client
from folovllm.engine.start_core import ExecutorFactory
from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import EngineStats, RequestOutput
from folovllm.sampling_params import SamplingParams
from folovllm.trace.watch import Watcher, Watchers

__all__ = ["AsyncLLM", "EngineClosingError", "EngineDeadError", "EngineObserver", "RequestFailedError"]
logger = logging.getLogger(__name__)


class EngineClosingError(RuntimeError):
    """The engine finishes what it has, and takes no new requests."""


class AsyncLLM:
    """An engine for many concurrent callers. Make it with `await start(...)`, or by a model's name with
    `await folovllm.start_async_llm("smollm2-135m")`.

    `config` is the resolved one, and `description` says what runs (see Executor.describe).
    """

    def __init__(
        self,
        client: CoreClient,
        ready: Ready,
        tokenizer: Tokenizer | None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.config: EngineConfig = ready.config
        self.kv_cache_config: KVCacheConfig = ready.kv_cache_config
        self.description = ready.description
        self.tokenizer = tokenizer
        self.sampling_defaults = dict(sampling_defaults or {})
        self.dead_error: EngineDeadError | None = None
        self.input_processor = InputProcessor.from_config(self.config, tokenizer)
        self._async_tokenizer = AsyncTokenizer(tokenizer)
        self._client = client
        self._requests = OpenRequests(self.config, tokenizer, client.send)
        self._watchers = Watchers(self._ask)
        self._call_ids = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}  # waiting for their CallResult
        self._is_closing = False
        client.subscribe(self._receive)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        model_path: Path,
        tokenizer: Tokenizer | Callable[[], Tokenizer | None] | None,
        *,
        in_process: bool = True,
        executor_factory: ExecutorFactory | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> "AsyncLLM":
        """Starts the engine, in a process of its own or (`in_process=False`) in a thread, and waits until it is ready.

        With `data_parallel_size` there are several engines: see data_parallel_client.py.

        Raises ValueError for a bad argument, EngineDeadError if the engine cannot be started. If `tokenizer` is a
        function, it is called while the engine starts. `executor_factory` takes the place of the model; `config` must
        then be resolved.
        """
        client = make_core_client(config, model_path, executor_factory, in_process)
        try:
            client.launch()
            loaded = tokenizer() if callable(tokenizer) else tokenizer
            return cls(client, await client.ready(), loaded, sampling_defaults)
        except BaseException:
            client.close(timeout=0.0)
            raise

    # ---- requests

    async def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival_time: float | None = None,
    ) -> RequestStream:
        """Queues a request and returns the stream of its outputs.

        Raises ValueError, and queues nothing, if it is bad. With n > 1 it becomes n requests of the core.
        """
        arrival_time = time.monotonic() if arrival_time is None else arrival_time
        self._check_open()
        prompt = await self._encode_long(prompt)
        self._check_open()  # the engine may have been closed meanwhile
        # Requests without a seed draw theirs here, in the order of their arrival.
        request = self.input_processor.process(request_id, prompt, params, arrival_time, priority)
        return self._requests.add(request, self.input_processor.prompt_text(prompt))

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the outputs of one request. Leaving the loop, or cancelling the task, aborts it."""
        async with await self.add_request(request_id, prompt, sampling_params, priority=priority) as stream:
            async for output in stream:
                yield output

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """Ends requests now: their streams get what there is, with finish_reason "abort". Unknown ids are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            self._requests.abort(request_id)

    @property
    def num_unfinished(self) -> int:
        """How many requests are unfinished; one with n > 1 counts n times."""
        return len(self._requests)

    @property
    def num_engines(self) -> int:
        """How many engines there are; more than one with `data_parallel_size`."""
        return self.config.parallel_config.data_parallel_size

    @property
    def num_alive(self) -> int:
        """How many of them serve now. A dead one of several is started again."""
        return 0 if self.is_dead else self._client.num_alive

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot of the engine."""
        return self._requests.stats

    # ---- text

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Raises ValueError without a tokenizer."""
        return await self._async_tokenizer.encode(text, add_special_tokens)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **chat_keywords: Any,
    ) -> dict[str, Any]:
        """The prompt for a conversation, as text and token ids: see `Tokenizer.chat_prompt`."""
        check_text = self.input_processor.check_text
        return await self._async_tokenizer.chat_prompt(
            messages, chat_template, add_generation_prompt, check_text, **chat_keywords
        )

    async def _encode_long(self, prompt: Prompt) -> Prompt:
        """A prompt with a long text gets its token ids. Every other prompt stays as it is."""
        given = {"prompt": prompt} if isinstance(prompt, str) else prompt
        if self.tokenizer is None or not isinstance(given, dict) or given.get("prompt_token_ids") is not None:
            return prompt
        text: Any = given.get("prompt")
        if not is_long(text):
            return prompt
        self.input_processor.check_text(text)
        return given | {"prompt_token_ids": await self.encode(text)}

    # ---- calls of the core

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached blocks. Returns False while requests run; `reset_running_requests` makes them restart."""
        return bool(await self._call("reset_prefix_cache", reset_running_requests))

    async def _call(self, name: str, *args: Any) -> Any:
        self.check_health()
        call_id, future = next(self._call_ids), asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._client.send(Call(call_id, name, args))
            return await future
        finally:
            self._calls.pop(call_id, None)

    # ---- what the core sends

    def _receive(self, message: UpMessage) -> None:
        if isinstance(message, StepOutputs):
            self._requests.on_step(message.stats, message.outputs)
            self._watchers.put(message.records)
        elif isinstance(message, CallResult):
            self._on_call_result(message)
        elif isinstance(message, Dead):
            self._die(message.cause)

    def _on_call_result(self, result: CallResult) -> None:
        future = self._calls.get(result.call_id)
        if future is None or future.done():
            return
        if result.error is None:
            future.set_result(result.value)
        else:
            future.set_exception(RuntimeError(result.error))

    # ---- watching

    def add_observer(self, observer: EngineObserver) -> None:
        """From now on `observer` hears of every request and every step."""
        self._requests.observers.append(observer)

    def watch(self) -> Watcher:
        """The live trace: `with engine.watch() as watcher: async for line in watcher: ...`, one line per step.

        The engine makes records only while there is a watcher.
        """
        return self._watchers.join()

    def _ask(self, name: str) -> None:
        """A call of the core that needs no answer."""
        if not self.is_dead:
            self._client.send(Call(next(self._call_ids), name))

    # ---- the end

    @property
    def is_dead(self) -> bool:
        return self.dead_error is not None

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine is dead."""
        if self.dead_error is not None:
            raise EngineDeadError(str(self.dead_error))

    def _check_open(self) -> None:
        self.check_health()
        if self._is_closing:
            raise EngineClosingError("the engine is shutting down and takes no new requests")

    def _die(self, cause: str) -> None:
        """Ends all streams, calls and watchers with the cause."""
        if self.dead_error is not None:
            return
        logger.error("the engine is dead: %s", cause)
        self.dead_error = EngineDeadError(cause)
        self._requests.die(cause)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(cause))
        self._watchers.close()

    async def drain(self, timeout: float) -> int:
        """Takes no new requests, and waits up to `timeout` seconds for those that it has.

        The rest is aborted: their streams end with finish_reason "abort". Returns how many those were.
        """
        self._is_closing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._requests.all_done.wait(), timeout)
        rest = self._requests.request_ids()
        self.abort(rest)
        return len(rest)

    async def shutdown(self, timeout: float = 10.0) -> None:
        """Ends everything: unfinished requests are aborted, and the engine stops. Calling it twice is fine.

        The engine's process is killed if it has not ended after `timeout` seconds.
        """
        self._is_closing = True
        self.abort(self._requests.request_ids())
        self._watchers.close()
        await asyncio.to_thread(self._client.close, timeout)
        self._async_tokenizer.shutdown()
        for future in self._calls.values():
            future.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()
