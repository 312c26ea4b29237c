"""EngineCore: the inner loop. One step is schedule -> execute -> sample -> update.

Milestone: M1. vLLM counterpart: vllm/v1/engine/core.py. Left out: the process boundary, batch queues, KV connectors.

Row 1: no torch. What computes is behind the Executor.
"""

from collections.abc import Iterable

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import make_kv_cache_config
from folovllm.core.sched.scheduler import Scheduler
from folovllm.executor.base import Executor
from folovllm.outputs import EngineCoreOutput, EngineStats
from folovllm.parts import load_part
from folovllm.request import Request, RequestStatus
from folovllm.trace.writer import NullTrace, make_trace


class EngineCore:
    """Scheduler and executor, and the order in which they are called. `config` must be resolved.

    `trace` is told of everything; by default it is what `config.trace` asks for.
    """

    def __init__(self, config: EngineConfig, executor: Executor, trace: NullTrace | None = None) -> None:
        self.config = config
        self.executor = executor
        self.kv_cache_config = make_kv_cache_config(config, executor.available_kv_cache_bytes())
        executor.initialize_kv_cache(self.kv_cache_config)
        self.scheduler: Scheduler = load_part("core.scheduler", config.parts)(config, self.kv_cache_config)
        self.trace = trace or make_trace(config, self.kv_cache_config)

    def add_request(self, request: Request) -> None:
        self.scheduler.add_request(request)
        self.trace.added(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests at any moment; unknown ids are ignored."""
        self.trace.finished(self.scheduler, self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED))

    def reset_prefix_cache(self, reset_running: bool = False) -> bool:
        """Forget all cached blocks; False, with nothing changed, while requests run (unless they are preempted)."""
        running = list(self.scheduler.running) if reset_running else []
        done = self.scheduler.reset_prefix_cache(reset_running)
        self.trace.preempted(self.scheduler, running[::-1])
        return done

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests()

    def step(self) -> list[EngineCoreOutput]:
        """Run one step; the outputs of the requests that got a token.

        An exception in the executor ends the requests of that step (nobody knows what their cache holds now) and goes
        on to the caller; all other requests, and the engine, live.
        """
        if not self.scheduler.has_requests():
            return []
        self.trace.begin("schedule")
        scheduler_output = self.scheduler.schedule()
        self.trace.scheduled(self.scheduler, scheduler_output)
        try:
            self.trace.begin("forward")
            handle = self.executor.execute(scheduler_output)
            self.trace.begin("sample")
            runner_output = self.executor.sample(handle)
        except BaseException:
            self.trace.finished(self.scheduler, self.scheduler.fail_step(scheduler_output))
            self.trace.end_step(self.scheduler, [])
            raise
        self.trace.begin("update")
        outputs = self.scheduler.update_from_output(scheduler_output, runner_output)
        self.trace.end_step(self.scheduler, outputs)
        if not self.has_unfinished_requests():
            self.scheduler.check_integrity()  # idle: the moment when a leaked block would show
        return outputs

    def stats(self) -> EngineStats:
        return self.scheduler.make_stats()

    def shutdown(self) -> None:
        self.trace.close()
        self.executor.shutdown()
