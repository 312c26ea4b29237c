"""LLMEngine: text in, text out, one step at a time. The core works on token ids; this is its front end.

Milestone: M1. vLLM counterpart: vllm/v1/engine/llm_engine.py. Left out: multiprocessing, LoRA, tracing headers.

    prompt --InputProcessor--> Request --EngineCore--> EngineCoreOutput --OutputProcessor--> RequestOutput
"""

import gc
import time
from collections.abc import Iterable

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.engine.input_processor import InputProcessor, Prompt
from folovllm.engine.output_processor import OutputProcessor
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.engine.tokenizer import Tokenizer
from folovllm.executor.base import Executor
from folovllm.outputs import EngineStats, RequestOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


class LLMEngine:
    """`add_request`, then `step` until nothing is unfinished. `config` must be resolved; `tokenizer` may be None."""

    def __init__(self, config: EngineConfig, executor: Executor, tokenizer: Tokenizer | None) -> None:
        arch = config.model_config.arch
        self.config = config
        self.tokenizer = tokenizer
        self.engine_core = EngineCore(config, executor)
        eos_token_id = None if tokenizer is None else tokenizer.eos_token_id
        self.input_processor = InputProcessor(
            tokenizer,
            vocab_size=arch.vocab_size,
            max_model_len=config.max_model_len,
            max_logprobs=config.model_config.max_logprobs,
            eos_token_id=eos_token_id,
            extra_eos_token_ids=tuple(i for i in arch.eos_token_ids if i < arch.vocab_size),
            seed=config.model_config.seed,
            rope=arch.rope,
        )
        self.output_processor = OutputProcessor(tokenizer)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a prompt: text, token ids or a dict with either. ValueError, with nothing added, if it is bad."""
        self.add_processed(self.process(request_id, prompt, params, arrival_time, priority), prompt)

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> Request:
        """Validate a prompt and make it a Request, without queueing it."""
        return self.input_processor.process(request_id, prompt, params, arrival_time, priority)

    def add_processed(self, request: Request, prompt: Prompt | None = None) -> None:
        """Queue a request that `process` made; n > 1 becomes n requests of the core."""
        text = None if prompt is None else self.input_processor.prompt_text(prompt)
        if request.sampling_params.n == 1:
            self._add(request, text)
            return
        parent = ParentRequest(request)
        for index, child in enumerate(parent.children()):
            self._add(child, text, parent, index)

    def _add(self, request: Request, text: str | None, parent: ParentRequest | None = None, index: int = 0) -> None:
        self.output_processor.add_request(request, text, parent, index)  # refuses ids in use, all children's at once
        self.engine_core.add_request(request)
        # The collector would search all that the imports left behind, 300,000 objects, again and again while tokens
        # come: 1 % of the time. Until the engine is idle it looks only at what is new. (vLLM freezes its core, too.)
        gc.freeze()

    def step(self) -> list[RequestOutput]:
        """One step of the engine; outputs of the requests that have something new to say."""
        try:
            core_outputs = self.engine_core.step()
        except BaseException:
            # The core has ended the requests of the failed step; the output side must not wait for them.
            self.output_processor.abort_requests([r for r in self.output_processor.states if not self._knows(r)])
            raise
        processed = self.output_processor.process_outputs(core_outputs, time.monotonic())
        if processed.reqs_to_abort:  # a stop string ends a request that the core would go on with
            self.engine_core.abort_requests(processed.reqs_to_abort)
        if not self.has_unfinished_requests():
            gc.unfreeze()
        return processed.request_outputs

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests at any moment; unknown ids are ignored."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self.engine_core.abort_requests(self.output_processor.abort_requests(ids))

    def has_unfinished_requests(self) -> bool:
        return self.engine_core.has_unfinished_requests()

    def has_request(self, request_id: str) -> bool:
        """Whether that request is unfinished."""
        return request_id in self.output_processor.states or request_id in self.output_processor.parents

    def _knows(self, request_id: str) -> bool:
        return request_id in self.engine_core.scheduler.requests

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget all cached blocks; False while requests run. With `reset_running_requests` they start again."""
        return self.engine_core.reset_prefix_cache(reset_running_requests)

    def stats(self) -> EngineStats:
        return self.engine_core.stats()

    def shutdown(self) -> None:
        self.engine_core.shutdown()
