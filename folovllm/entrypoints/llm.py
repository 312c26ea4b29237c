"""LLM: the offline interface. Give it prompts, get completions.

Milestone: M1. vLLM counterpart: vllm/entrypoints/llm.py. Left out: embeddings, beam search, LoRA.

Threads: every step takes a lock, so calls from several threads, and streams that are read in turns, share the batch.
Ctrl-C waits until the step under way is over; a second Ctrl-C interrupts the step. After a fork only the parent process
can use the engine: the child has none of torch's threads, so every call in it raises RuntimeError.
"""

import collections
import functools
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from tqdm import tqdm  # not tqdm.auto, which warns in notebooks without ipywidgets

from folovllm.config import DEFAULT_MODEL, EngineConfig
from folovllm.engine.input_processor import Prompt, check_sampling_params
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.start_core import resolve_config
from folovllm.engine.tokenizer import Tokenizer
from folovllm.entrypoints.keywords import check_keywords, drop_vllm_keywords
from folovllm.entrypoints.start import announce_defaults, find_model_files
from folovllm.executor.select import make_executor
from folovllm.interrupts import HeldInterrupts
from folovllm.outputs import EngineStats, RequestOutput
from folovllm.request import Request
from folovllm.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
P = ParamSpec("P")
R = TypeVar("R")


def _one_at_a_time(method: Callable[Concatenate["LLM", P], R]) -> Callable[Concatenate["LLM", P], R]:
    """Decorator. While the method runs, its thread has the engine to itself.

    This is no context manager made of a generator: an exception that comes while such a generator is entered leaves it
    suspended, with the lock, for as long as the traceback lives.
    """

    @functools.wraps(method)
    def alone(self: "LLM", *args: P.args, **keywords: P.kwargs) -> R:
        me = threading.get_ident()
        self._check_turn(me)
        try:
            with self._lock:
                self._thread_at_work = me
                self._end_abandoned()
                result = method(self, *args, **keywords)
                self._thread_at_work = None
        finally:
            if self._thread_at_work == me:
                self._thread_at_work = None
        self._end_abandoned_if_free()
        return result

    return alone


class LLM:
    """A model with an engine around it.

    `model` is an alias ("smollm2-135m"), a HuggingFace folder or a HuggingFace id; `preset` a milestone ("m1"), by
    default the highest that is built; `without` milestones to leave out. All else is an engine argument with vLLM's
    name, e.g. dtype, max_model_len, max_num_seqs, block_size, seed, device (see folovllm.config). Raises ValueError for
    bad arguments, and the errors of `folovllm.hub` where the model is missing or broken.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        preset: str | None = None,
        without: Iterable[str] = (),
        **engine_args: Any,
    ) -> None:
        config = EngineConfig.from_args(preset=preset, without=without, model=model, **engine_args)
        refuse_data_parallelism(config)
        model_files = find_model_files(config)
        self.model_path = model_files.path
        self._default_sampling = model_files.sampling_defaults
        self._defaults_announced = False
        self.config = resolve_config(model_files.config, model_files.arch)
        tokenizer = model_files.load_tokenizer()
        executor = make_executor(self.config, self.model_path)
        try:
            self.llm_engine = LLMEngine(self.config, executor, tokenizer)
        except BaseException:
            executor.shutdown()  # its processes would outlive the engine
            raise
        self._log_what_runs()
        # A trace is complete only once it is closed: at the latest when this object or the interpreter goes.
        self.shutdown = weakref.finalize(self, self.llm_engine.shutdown)
        self._request_ids = itertools.count()
        self._process_id = os.getpid()
        self._lock = threading.Lock()  # held while the engine is used: for a step, not for a whole call
        self._thread_at_work: int | None = None  # the one that holds the lock
        self._waited_for: set[str] = set()  # requests of the calls and streams that are open
        self._mail: list[RequestOutput] = []  # their outputs that have not been fetched yet
        self._abandoned: collections.deque[str] = collections.deque()  # requests to end as soon as the lock is free

    def _log_what_runs(self) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            for name, value in self.describe().items():
                for line in value if isinstance(value, list) else [value]:
                    logger.debug("%s: %s", name, line)

    def describe(self) -> dict[str, Any]:
        """What runs: each layer's method, attention backend, sampler, threads, and what replaced parts of the model."""
        return self.llm_engine.engine_core.executor.describe()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError if the engine was started without one."""
        if self.llm_engine.tokenizer is None:
            raise ValueError("this LLM has no tokenizer: start it without skip_tokenizer_init=True")
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that give none: those of generation_config.json, and else SamplingParams' own.

        `generation_config="vllm"` leaves the file out; `override_generation_config` changes single values.
        """
        return SamplingParams(**self.sampling_defaults())

    def sampling_defaults(self) -> dict[str, Any]:
        """What generation_config.json and `override_generation_config` set. The first call logs it."""
        if self._default_sampling and not self._defaults_announced:
            self._defaults_announced = True
            announce_defaults(self._default_sampling)
        return dict(self._default_sampling)

    def stats(self) -> EngineStats:
        return self.llm_engine.stats()

    @_one_at_a_time
    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached prefixes, e.g. before a measurement. Returns False, and does nothing, during a stream."""
        return self.llm_engine.reset_prefix_cache(reset_running_requests)

    @check_keywords
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes `prompts`: text, token ids, {"prompt": ...} / {"prompt_token_ids": [...]}, or a list of those.

        One SamplingParams for all or one for each. Results come in the order of the prompts. Everything is validated
        before anything runs. If anything raises, the requests of this call are withdrawn, and nothing else is.
        """
        prompt_list = _as_prompt_list(prompts)
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params_list = _one_for_each("sampling_params", params, len(prompt_list))
        priorities = _one_for_each("priority", 0 if priority is None else priority, len(prompt_list))
        return self._run(prompt_list, params_list, priorities, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **chat_keywords: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation like [{"role": "user", "content": "Hello"}], or a list of conversations.

        The messages are OpenAI's; `chat_keywords` are those of `chat_prompt`.
        """
        conversations = _as_conversations(messages)
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(self.chat_prompt(conversation, chat_template, add_generation_prompt, **chat_keywords))
            except ValueError as error:
                where = f"conversation {index}: " if len(conversations) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_prompt(
        self,
        messages: Messages,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **chat_keywords: Any,
    ) -> dict[str, Any]:
        """The prompt for a conversation, as text and token ids; the template brings its own special tokens.

        `chat_keywords` are vLLM's `tools`, `documents`, `continue_final_message`, `chat_template_content_format` and
        `chat_template_kwargs`, and any variable that the template reads. Raises TypeError for another keyword.
        """
        keywords = drop_vllm_keywords(chat_keywords)
        check_text = self.llm_engine.input_processor.check_text
        return self.get_tokenizer().chat_prompt(messages, chat_template, add_generation_prompt, check_text, **keywords)

    @check_keywords
    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Completes one prompt, yielding after every step what is new (or what `output_kind` says, if not CUMULATIVE).

        Leaving the loop early aborts the request. Several streams may be read in turns.
        """
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        check_sampling_params(params)
        if params.output_kind is RequestOutputKind.CUMULATIVE:
            params = params.replace(output_kind=RequestOutputKind.DELTA)
        own: list[str] = []
        try:
            with HeldInterrupts():
                self._add([prompt], [params], [0], own)
            while True:
                with HeldInterrupts():
                    outputs = self._fetch(own)
                    if not outputs and not self._step(own):
                        return
                yield from outputs
        finally:
            self._release(own)

    # ---- one engine, several callers

    def _check_turn(self, me: int) -> None:
        """RuntimeError if the thread `me` cannot use the engine now, and waiting would not help."""
        if os.getpid() != self._process_id:
            raise RuntimeError(
                "this LLM was made in another process, and a forked child has none of torch's threads. Start the child "
                "with multiprocessing.get_context('spawn'), and make an LLM in it"
            )
        if self._thread_at_work == me and self._lock.locked():
            raise RuntimeError(
                "the engine was called from inside one of its own steps, by a signal handler or a callback"
            )

    @_one_at_a_time
    def _add(
        self, prompts: list[Any], params: list[Any], priorities: list[Any], own: list[str], final_only: bool = False
    ) -> None:
        """Validates all prompts, then queues them. `own` receives their ids, which the caller must `_release`."""
        requests = [
            self._process(index, prompt, params, priority)
            for index, (prompt, params, priority) in enumerate(zip(prompts, params, priorities, strict=True))
        ]
        own += [request.request_id for request in requests]
        self._waited_for.update(own)
        for request, prompt in zip(requests, prompts, strict=True):
            if final_only:
                kind = RequestOutputKind.FINAL_ONLY
                request.sampling_params = request.sampling_params.replace(output_kind=kind)
            self.llm_engine.add_processed(request, prompt)

    @_one_at_a_time
    def _step(self, own: Collection[str]) -> bool:
        """Runs one step for all callers, unless the mail has something for this one already.

        Returns False if `own` have all ended. If the step fails, only `own` end: no other caller loses a request.
        """
        if any(output.request_id in own for output in self._mail):
            return True
        if not any(self.llm_engine.has_request(request_id) for request_id in own):
            return False
        try:
            self.llm_engine.step_into(self._mail, own)
        finally:
            self._mail[:] = [output for output in self._mail if output.request_id in self._waited_for]
        return True

    def _fetch(self, own: Collection[str]) -> list[RequestOutput]:
        """Takes the outputs of `own` out of the mail."""
        return self._fetch_from_mail(own) if self._mail else []

    @_one_at_a_time
    def _fetch_from_mail(self, own: Collection[str]) -> list[RequestOutput]:
        outputs = [output for output in self._mail if output.request_id in own]
        self._mail[:] = [output for output in self._mail if output.request_id not in own]
        return outputs

    def _release(self, request_ids: Collection[str]) -> None:
        """Ends requests of which the caller wants nothing more: at once, or when the step under way is over.

        The garbage collector may close a half-read stream in any thread, also in the middle of a step. So this does not
        wait for the lock. An exception goes on to the caller when the requests have ended.
        """
        try:
            self._abandoned.extend(request_ids)
            self._end_abandoned_if_free()
        except BaseException:
            self._abandoned.extend(request_ids)  # twice does no harm
            self._end_abandoned_if_free()
            raise

    def _end_abandoned_if_free(self) -> None:
        while self._abandoned and not self._lock.locked() and os.getpid() == self._process_id:
            self._wait_for_turn()  # which ends them

    @_one_at_a_time
    def _wait_for_turn(self) -> None:
        """Does nothing itself: each turn begins by ending the abandoned requests."""

    def _end_abandoned(self) -> None:
        while self._abandoned:
            request_id = self._abandoned[0]
            self.llm_engine.withdraw([request_id])  # does nothing to a finished one
            self._waited_for.discard(request_id)
            self._mail[:] = [output for output in self._mail if output.request_id != request_id]
            self._abandoned.popleft()

    def _new_request_id(self) -> str:
        """A number that no unfinished request has, also none that was added to `llm_engine` directly."""
        return next(i for i in map(str, self._request_ids) if not self.llm_engine.has_request(i))

    def _process(self, index: int, prompt: Prompt, params: SamplingParams, priority: int) -> Request:
        try:
            return self.llm_engine.process(self._new_request_id(), prompt, params, priority=priority)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None

    def _run(
        self,
        prompts: list[Prompt],
        params: list[SamplingParams],
        priorities: list[int],
        use_tqdm: bool | Callable[..., tqdm],
    ) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        own: list[str] = []
        with HeldInterrupts() as interrupts:
            try:
                self._add(prompts, params, priorities, own, final_only=True)
                own_ids = frozenset(own)
                with _progress_bar(use_tqdm, len(own)) as bar:
                    while self._step(own_ids):
                        for output in self._fetch(own_ids):
                            outputs[output.request_id] = output
                            _advance(bar, output, self.llm_engine.stats())
                        interrupts.deliver()
            finally:
                self._release(own)
        if missing := [request_id for request_id in own if request_id not in outputs]:
            raise RuntimeError(f"generate() got no result: request {', '.join(missing)} was aborted from outside")
        return [outputs[request_id] for request_id in own]


def _as_prompt_list(prompts: Any) -> list[Any]:
    """The prompts as a list. A list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, dict)) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(p, int) for p in prompts)
    ):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(
            f"prompts must be a string, token ids, a dict or a list of those, got {type(prompts).__name__}"
        )
    return list(prompts)


def _one_for_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{len(value)} {name} for {count} prompts: give one for all, or one for each")
    return list(value)


def _as_conversations(messages: Any) -> list[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a non-empty list like [{'role': 'user', 'content': 'Hello'}]")
    return list(messages) if isinstance(messages[0], Sequence) else [messages]


def _progress_bar(use_tqdm: bool | Callable[..., tqdm], total: int) -> tqdm:
    make = use_tqdm if callable(use_tqdm) else tqdm
    return make(total=total, desc="Processed prompts", dynamic_ncols=True, disable=not use_tqdm)


def _advance(bar: tqdm, output: RequestOutput, stats: EngineStats) -> None:
    if bar.disable:
        return
    new_in, new_out = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
    bar.folovllm_in = getattr(bar, "folovllm_in", 0) + new_in
    bar.folovllm_out = getattr(bar, "folovllm_out", 0) + new_out
    elapsed = max(bar.format_dict["elapsed"], 1e-9)
    hits = f", prefix hits {stats.prefix_cache_hit_rate:.0%}" if stats.prefix_cache_hits else ""
    bar.set_postfix_str(
        f"input {bar.folovllm_in / elapsed:.1f} tok/s, output {bar.folovllm_out / elapsed:.1f} tok/s, "
        f"KV {stats.kv_cache_usage:.0%}{hits}",
        refresh=False,
    )
    bar.update(1)


def refuse_data_parallelism(config: EngineConfig) -> None:
    """An LLM is one engine: its methods step it."""
    size = config.parallel_config.data_parallel_size
    if size > 1:
        raise ValueError(
            f"data_parallel_size={size}: an LLM is one engine. `folovllm serve -dp {size}` serves with several, "
            "folovllm.data computes a file of prompts with several, and an LLM in each of your processes does, too"
        )
