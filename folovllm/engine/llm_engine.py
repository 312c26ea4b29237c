"""LLMEngine: text in, text out, one step at a time. The core works on token ids; this is its front end.

Milestone: M1. vLLM counterpart: vllm/v1/engine/llm_engine.py. Left out: multiprocessing, LoRA, tracing headers.

    prompt --InputProcessor--> Request --EngineCore--> EngineCoreOutput --OutputProcessor--> RequestOutput

Like the core's, each call does its work or undoes it and raises; front end and core then know the same requests. An
engine belongs to one thread at a time: `LLM` sees to that.
"""

import time
from collections.abc import Collection, Iterable

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.engine.input_processor import InputProcessor, Prompt
from folovllm.engine.output_processor import OutputProcessor, ProcessedOutputs
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.engine.tokenizer import Tokenizer
from folovllm.executor.base import Executor
from folovllm.interrupts import HeldInterrupts
from folovllm.outputs import EngineCoreOutput, EngineStats, RequestOutput
from folovllm.parts import load_part
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


class StepResult:
    """The front end's part of one step: see `StepConsumer`."""

    def __init__(self, output_processor: OutputProcessor) -> None:
        self._output_processor = output_processor
        self.processed = ProcessedOutputs()

    def process(self, outputs: list[EngineCoreOutput]) -> None:
        self.processed = self._output_processor.process_outputs(outputs, time.monotonic())

    def take_back(self) -> None:
        self.processed = ProcessedOutputs()
        self._output_processor.take_back()


class LLMEngine:
    """`add_request`, then `step` until nothing is unfinished. `config` must be resolved; `tokenizer` may be None."""

    def __init__(self, config: EngineConfig, executor: Executor, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.input_processor = InputProcessor.from_config(config, tokenizer)
        self.output_processor = OutputProcessor(tokenizer, text_stream=load_part("engine.text_stream", config.parts))
        # Outputs of requests that did not end in a step. The next step returns them.
        self._late_outputs: list[RequestOutput] = []
        self.engine_core = EngineCore(config, executor)  # last: it opens the trace

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> None:
        """Queues a prompt: text, token ids or a dict with either. Raises ValueError, and adds nothing, if it is bad."""
        self.add_processed(self.process(request_id, prompt, params, arrival_time, priority), prompt)

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> Request:
        """Validates a prompt and makes it a Request, without queueing it."""
        return self.input_processor.process(request_id, prompt, params, arrival_time, priority)

    def add_processed(self, request: Request, prompt: Prompt | None = None) -> None:
        """Queues a request that `process` made. One with n > 1 becomes n requests of the core: all of them, or none."""
        text = None if prompt is None else self.input_processor.prompt_text(prompt)
        parent = ParentRequest(request) if request.sampling_params.n > 1 else None
        requests = [request] if parent is None else parent.children()
        try:
            for index, child in enumerate(requests):
                self.output_processor.add_request(child, text, parent, index)
                self.engine_core.add_request(child)
        except BaseException:
            with HeldInterrupts(patience=None):
                self.output_processor.withdraw(requests)
                self._reconcile([child.request_id for child in requests if self.engine_core.serves(child)])
            raise

    def step(self, blamed: Collection[str] | None = None) -> list[RequestOutput]:
        """Runs one step and returns the outputs of the requests that have something new to say.

        If it raises, its requests have ended, or those of them that `blamed` names. All others have lost nothing.
        """
        outputs: list[RequestOutput] = []
        try:
            self.step_into(outputs, blamed)
        except BaseException:
            self._late_outputs = outputs + self._late_outputs
            raise
        return outputs

    def step_into(self, outputs: list[RequestOutput], blamed: Collection[str] | None = None) -> None:
        """Like `step`, and appends to `outputs`. If an exception comes when the step is over, its outputs are there."""
        result, num_before = StepResult(self.output_processor), len(outputs)
        try:
            self.engine_core.step(result, None if blamed is None else self.output_processor.core_ids(blamed))
            self._deliver(result.processed, outputs)
            if result.processed.reqs_to_abort:  # a stop string ends a request that the core would continue
                self.engine_core.abort_requests(result.processed.reqs_to_abort)
        except BaseException:
            with HeldInterrupts(patience=None):
                if len(outputs) == num_before:
                    self._deliver(result.processed, outputs)
                self._late_outputs = []
                self.output_processor.commit()
                self._reconcile(result.processed.reqs_to_abort)
            raise

    def _deliver(self, processed: ProcessedOutputs, outputs: list[RequestOutput]) -> None:
        outputs += self._late_outputs + processed.request_outputs
        self._late_outputs = []
        self.output_processor.commit()

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Ends requests at any moment. Unknown ids are ignored.

        If some of the n completions of a request have finished already, the next step returns its last output.
        """
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        core_ids = self.output_processor.core_ids(ids)
        try:
            self.engine_core.abort_requests(core_ids)
            self._end_in_front(core_ids, "abort")
        except BaseException:
            with HeldInterrupts(patience=None):
                self.output_processor.take_back()
                self._end_in_front(core_ids, "abort")
                self._reconcile(core_ids)
            raise

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Ends requests whose caller wants nothing more of them, not even their last outputs."""
        ids = set(request_ids)
        try:
            self.abort_request(ids)
        finally:
            self._late_outputs = [output for output in self._late_outputs if output.request_id not in ids]

    def _end_in_front(self, core_ids: Iterable[str], reason: str) -> None:
        """Ends requests in the front end. What a request with several completions has to say comes with the next step.

        A request with one completion, or with none finished, says nothing more: its caller knows how it ended.
        """
        states = self.output_processor.states
        known = [core_id for core_id in core_ids if core_id in states]
        parents = {p.request_id for i in known if (p := states[i].parent) is not None and p.has_finished_child}
        outputs = self.output_processor.abort(known, time.monotonic(), reason).request_outputs
        self._late_outputs += [output for output in outputs if output.request_id in parents]
        self.output_processor.commit()

    def _reconcile(self, core_ids: Iterable[str]) -> None:
        """After an exception: ends what only the front end knows, and those of `core_ids` that only the core knows."""
        states = self.output_processor.states
        self._end_in_front([i for i, state in states.items() if not self.engine_core.serves(state.request)], "error")
        self.engine_core.abort_requests([core_id for core_id in core_ids if core_id not in states])

    def has_unfinished_requests(self) -> bool:
        """Whether a step would return anything, now or later."""
        return self.engine_core.has_unfinished_requests() or bool(self._late_outputs)

    def has_request(self, request_id: str) -> bool:
        """Whether that request is unfinished, or its last output has not been returned yet."""
        processor = self.output_processor
        is_late = any(output.request_id == request_id for output in self._late_outputs)
        return request_id in processor.states or request_id in processor.parents or is_late

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached blocks. Returns False while requests run; `reset_running_requests` makes them restart."""
        return self.engine_core.reset_prefix_cache(reset_running_requests)

    def stats(self) -> EngineStats:
        return self.engine_core.stats()

    def shutdown(self) -> None:
        self.engine_core.shutdown()
