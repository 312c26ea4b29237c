"""The toy server: clients of the toy engine, without HTTP, threads or a clock.

Milestone: M8. vLLM counterpart: none. Exercises about serving and the demo of the milestone play their scenes on it.

    server = ToyServer(stream_class=mine.cls, num_kv_blocks=20)
    async with server.open("a") as stream:
        server.step()                                  # the engine computes, and no task runs meanwhile
        print(await anext(stream), server.num_used_blocks)

A real server steps its engine in a process of its own. Here a step happens when the scene says so, so that blocks can
be counted between two events.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.request_stream import RequestStream
from folovllm.executor.base import Executor
from folovllm.learn.toy_engine import MAX_STEPS, AttendingExecutor, check_core, make_config, make_core, make_request
from folovllm.outputs import CompletionOutput, EngineCoreOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind

DELTA = RequestOutputKind.DELTA
Scene = TypeVar("Scene")


def text_of(token_ids: Sequence[int]) -> str:
    """The toy text of tokens. E.g. [12, 7] -> "12 7 "."""
    return "".join(f"{token_id} " for token_id in token_ids)


class ToyServer:
    """The toy engine, and a collector and a stream for each client. `aborted` lists the ids that were aborted."""

    def __init__(
        self,
        stream_class: Callable[..., Any] = RequestStream,
        collector_class: Callable[..., Any] = RequestOutputCollector,
        **config_args: Any,
    ) -> None:
        config = {"max_model_len": 64, "block_size": 4, "num_kv_blocks": 65, "max_num_seqs": 8} | config_args
        self.core = make_core(**config)
        self.stream_class, self.collector_class = stream_class, collector_class
        self.collectors: dict[str, Any] = {}
        self.prompts: dict[str, list[int]] = {}
        self.aborted: list[str] = []

    def open(self, request_id: str, prompt: int = 8, max_tokens: int = 24) -> Any:
        """Queues a request and returns the stream of its client."""
        request = make_request(request_id, prompt, max_tokens)
        self.prompts[request_id] = list(request.prompt_token_ids)
        self.collectors[request_id] = collector = self.collector_class(DELTA)
        self.core.add_request(request)
        return self.stream_class(request_id, collector, self.abort)

    def step(self) -> list[EngineCoreOutput]:
        """One step of the engine. Each request that got tokens has them in its collector afterwards."""
        outputs = self.core.step()
        check_core(self.core)
        for output in outputs:
            self._deliver(output.request_id, output.new_token_ids, output.finish_reason)
        return outputs

    async def serve(self) -> None:
        """Steps until no request is left. After each step the clients run for as long as they have something to do."""
        for _ in range(MAX_STEPS):
            if not self.core.has_unfinished_requests():
                return
            self.step()
            await clients_run()
        raise AssertionError(f"not done after {MAX_STEPS} steps: {self.core.stats()}")

    def abort(self, request_id: str) -> None:
        """Ends a request now: its blocks are free before the next step. Unknown and finished ids are ignored."""
        self.aborted.append(request_id)
        if request_id in self.collectors:
            self.core.abort_requests([request_id])
            self._deliver(request_id, [], "abort")

    @property
    def num_used_blocks(self) -> int:
        pool = self.core.scheduler.kv_cache_manager.block_pool
        return self.core.kv_cache_config.num_usable_blocks - pool.get_num_free_blocks()

    def _deliver(self, request_id: str, token_ids: list[int], finish_reason: str | None) -> None:
        completion = CompletionOutput(0, text_of(token_ids), list(token_ids), finish_reason=finish_reason)
        finished = finish_reason is not None
        collector = self.collectors.pop(request_id) if finished else self.collectors[request_id]
        collector.put(RequestOutput(request_id, None, self.prompts[request_id], [completion], finished))


async def clients_run(turns: int = 5) -> None:
    """Lets every other task run until it waits again. A few turns of the event loop are enough for the toy clients."""
    for _ in range(turns):
        await asyncio.sleep(0)


def play(scene: Coroutine[Any, Any, Scene], seconds: float = 5.0) -> Scene:
    """Runs a scene to its end. Raises AssertionError if it hangs: some task waits for an event that never comes."""

    async def with_limit() -> Scene:
        # The scene reports what its tasks raise, so the event loop does not log it.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        task = asyncio.create_task(scene)
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            waiting = [calls_of(other) for other in asyncio.all_tasks() - {asyncio.current_task()}]
            raise AssertionError(
                f"the scene was not over after {seconds:g} seconds: a task waits for an event that never comes. "
                f"Tasks that wait, each with its calls: {'; '.join(sorted(waiting))}"
            )
        return task.result()

    return asyncio.run(with_limit())


def calls_of(task: "asyncio.Task[Any]") -> str:
    """The calls in which a task waits, the outermost first. E.g. "reader > get > wait"."""
    names, awaited = list[str](), cast(Any, task.get_coro())
    while inspect.iscoroutine(awaited):
        names.append(awaited.__name__)
        awaited = awaited.cr_await
    return " > ".join(names)


# ---- the real front end on the fake model


class HeldExecutor(AttendingExecutor):
    """A fake model that computes a step only when `allow` lets it, so that a scene can act between two steps."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = threading.Semaphore(0)
        self._is_held = True

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        if self._is_held and scheduler_output.total_num_scheduled_tokens:
            self._steps.acquire()
        return super().execute(scheduler_output)

    def allow(self, num_steps: int) -> None:
        self._steps.release(num_steps)

    def go_on(self) -> None:
        """Holds no step any more."""
        self._is_held = False
        self._steps.release()


async def start_toy_llm(executor: Executor | None = None, **config_args: Any) -> AsyncLLM:
    """An AsyncLLM whose engine runs the fake model in a thread. Prompts are token ids, and there is no text."""
    config = make_config(**{"max_model_len": 64, "block_size": 4, "num_kv_blocks": 65, "max_num_seqs": 8} | config_args)
    model = executor or AttendingExecutor()
    return await AsyncLLM.start(config, Path(), None, in_process=False, executor_factory=lambda _: model)
