"""ReplicaObservers: one observer of an AsyncLLM becomes a set of observers per engine.

Milestone: M10. vLLM counterpart: `StatLoggerManager.per_engine_logger_dict` in vllm/v1/metrics/loggers.py.

    AsyncLLM --on_step--> ReplicaObservers --> EngineMetrics and ThroughputLog of engine 0
                                           --> EngineMetrics and ThroughputLog of engine 1

The statistics of a step say how each engine is. An output belongs to the engine that gave its last token, and a request
to the engine that gave its first output.
"""

from collections.abc import Sequence

from folovllm.engine.open_requests import EngineObserver
from folovllm.outputs import NO_STATS, EngineStats, RequestOutput
from folovllm.request import Request


class ReplicaObservers(EngineObserver):
    """`observers[i]` hear of engine i alone."""

    def __init__(self, observers: Sequence[Sequence[EngineObserver]]) -> None:
        self._observers = observers
        self._stats = [NO_STATS] * len(observers)
        self._new: dict[str, Request] = {}  # requests without an output

    def on_added(self, request: Request) -> None:
        self._new[request.request_id] = request

    def on_step(self, stats: EngineStats, outputs: list[RequestOutput]) -> None:
        for engine, (before, now) in enumerate(zip(self._stats, stats.replicas, strict=False)):
            own = [output for output in outputs if _engine_of(output) == engine]
            if own or now is not before:
                self._tell(engine, now, own)
                self._stats[engine] = now

    def _tell(self, engine: int, stats: EngineStats, outputs: list[RequestOutput]) -> None:
        new = [self._new.pop(output.request_id) for output in outputs if output.request_id in self._new]
        for observer in self._observers[engine]:
            for request in new:
                observer.on_added(request)
            observer.on_step(stats, outputs)

    def on_dead(self, cause: str) -> None:
        self._new.clear()
        for observers in self._observers:
            for observer in observers:
                observer.on_dead(cause)


def _engine_of(output: RequestOutput) -> int:
    return 0 if output.metrics is None else output.metrics.replica
