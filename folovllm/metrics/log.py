"""ThroughputLog: a line in the log every ten seconds while the engine works.

Milestone: M8. vLLM counterpart: LoggingStatLogger (vllm/v1/metrics/loggers.py); the words of the line are vLLM's, for
the tools that read it.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from folovllm.engine.open_requests import EngineObserver
from folovllm.outputs import EngineStats, RequestOutput

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0


class ThroughputLog(EngineObserver):
    """Observes an AsyncLLM. A step starts the timer; the timer goes on until an interval passes without a token.

    So a busy server logs a line per interval, then one with zeros, and an idle server logs nothing.
    """

    def __init__(
        self, interval: float = INTERVAL_SECONDS, clock: Callable[[], float] = time.monotonic, engine: int = 0
    ) -> None:
        self.interval = interval
        self._engine = engine
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._stats: EngineStats | None = None
        self._start = 0.0  # of the interval
        self._tokens_before = (0, 0)  # prompt and generation tokens at its start

    def on_step(self, stats: EngineStats, request_outputs: list[RequestOutput]) -> None:
        """Called on the event loop after each step."""
        self._stats = stats
        if self._timer is None:
            self._begin()

    def on_dead(self, cause: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        self._start = self._clock()
        self._timer = asyncio.get_running_loop().call_later(self.interval, self.log)

    def log(self) -> None:
        """Writes the line of the interval that ends now, and begins the next one unless the engine is idle."""
        stats, self._timer = self._stats, None
        assert stats is not None, "the timer starts with a step"
        tokens = (stats.num_prompt_tokens, stats.num_generation_tokens)
        seconds = max(self._clock() - self._start, 1e-9)
        prompt, generation = ((now - before) / seconds for now, before in zip(tokens, self._tokens_before, strict=True))
        logger.info(
            "Engine %03d: Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
            "Running: %d reqs, Waiting: %d reqs, GPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            self._engine, prompt, generation, stats.num_running, stats.num_waiting, stats.kv_cache_usage * 100,
            stats.prefix_cache_hit_rate * 100,
        )  # fmt: skip
        if tokens != self._tokens_before or stats.num_running or stats.num_waiting:
            self._tokens_before = tokens
            self._begin()
