"""Scheduler: decides in every step how many tokens of which requests are computed.

Milestone: M1 (one request), M2 (continuous batching), M5 (chunks), M6 (prefix hits), M9 (several steps in flight).
vLLM counterpart: vllm/v1/core/sched/scheduler.py.
Left out: encoder budgets, KV connectors, LoRA limits, structured output.

Row 1: no torch. There are no phases: a step gives a request some tokens so that `num_computed_tokens` catches up with
`num_tokens`. A prompt, a chunk of one, a decode and a resumed request are the same operation with different numbers.
"""

import time
from collections.abc import Iterable

from folovllm.config import EngineConfig
from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.kv_cache_utils import KVCacheBlock, KVCacheConfig
from folovllm.core.prefix_index import make_prefix_index
from folovllm.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from folovllm.core.sched.recovery import StepRecovery
from folovllm.core.sched.request_queue import RequestQueue
from folovllm.core.sched.step import Step
from folovllm.core.sched.steps_in_flight import StepsInFlight
from folovllm.outputs import EngineCoreOutput, EngineStats, ModelRunnerOutput
from folovllm.parts import load_part
from folovllm.request import Request, RequestStatus, check_stop


class Scheduler(StepsInFlight, StepRecovery):
    """Owns every unfinished request: `waiting` in its queue's order, `running` in the order of admission.

    What ends or undoes a step in which something raised is inherited from StepRecovery (recovery.py), and what lets
    several steps be in flight from StepsInFlight (steps_in_flight.py).
    """

    def __init__(self, config: EngineConfig, kv_cache_config: KVCacheConfig) -> None:
        scheduler_config = config.scheduler_config
        self.config = config
        self.kv_cache_config = kv_cache_config
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_model_len = config.max_model_len
        self.max_steps_in_flight = config.max_steps_in_flight
        self.is_pipelined = config.parallel_config.pipeline_parallel_size > 1
        self.enable_chunked_prefill = scheduler_config.enable_chunked_prefill
        self.long_prefill_token_threshold = scheduler_config.long_prefill_token_threshold
        self.reserve_full_sequence = scheduler_config.reserve_full_sequence
        self.batching = scheduler_config.batching
        self.scheduling_policy = scheduler_config.scheduling_policy

        self.kv_cache_manager = self._make_kv_cache_manager()
        self.requests: dict[str, Request] = {}
        self.waiting = self._make_queue()
        self.running: list[Request] = []
        self.finished_req_ids: set[str] = set()  # since the last step: the worker has not heard of them yet
        self._step: Step | None = None  # the latest, until `commit_step`
        self._in_flight: list[Step] = []  # scheduled and not updated, oldest first: several in a pipelined engine

        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_last_scheduled_tokens = 0
        self.num_preemptions = 0

    def _make_kv_cache_manager(self) -> KVCacheManager:
        """A KV cache in which all blocks are free and no prefix is known."""
        parts, cache_config = self.config.parts, self.config.cache_config
        make_pool, make_manager = (load_part(f"core.{part}", parts) for part in ("block_pool", "kv_cache_manager"))
        pool: BlockPool = make_pool(
            self.kv_cache_config.num_blocks,
            make_prefix_index(cache_config, parts),
            free_uncached_first=cache_config.free_uncached_first,
        )
        manager: KVCacheManager = make_manager(
            self.kv_cache_config.block_size,
            self.max_model_len,
            pool,
            partial_block_hits=cache_config.partial_block_hits,
        )
        return manager

    def _make_queue(self) -> RequestQueue:
        queue: RequestQueue = load_part(f"core.request_queue.{self.scheduling_policy}", self.config.parts)()
        return queue

    # ---- requests come and go

    def add_request(self, request: Request) -> None:
        """Queues a new request. Raises ValueError, and changes nothing, if its id is in use."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is already in use; give every request its own id")
        # Without room for a token the request would wait forever. The input processor refuses such prompts.
        assert request.num_prompt_tokens < self.max_model_len, f"{request}: no room for a token to generate"
        self.requests[request.request_id] = request
        self.kv_cache_manager.add_request(request)
        self.waiting.add_request(request)

    def finish_requests(self, request_ids: Iterable[str], status: RequestStatus) -> list[Request]:
        """Ends requests from outside, wherever they are (an abort, a stop string). Unknown ids are ignored."""
        assert RequestStatus.is_finished(status)
        unique_ids = dict.fromkeys(request_ids)  # not a set: blocks are freed in this order, the same in every run
        return self._finish([self.requests[i] for i in unique_ids if i in self.requests], status)

    def _finish(self, finished: list[Request], status: RequestStatus) -> list[Request]:
        gone = {id(request) for request in finished}
        self.running = [request for request in self.running if id(request) not in gone]
        queued = [request for request in finished if request.status != RequestStatus.RUNNING]
        if queued:  # searching a long queue costs more than the whole step
            self.waiting.remove_requests(queued)
        for request in finished:
            request.set_status(status)
            self._free(request)
        return finished

    def reset_prefix_cache(self, reset_running: bool = False) -> bool:
        """Forgets all cached blocks. Returns False, and changes nothing, while requests hold blocks.

        If `reset_running`, the running requests are preempted first and compute everything again. Call it only between
        two steps. Steps in flight go on, and the tokens that they sample arrive.
        """
        if reset_running:
            for request in reversed(self.running):  # each goes to the front of the queue, so that their order stays
                self.preempt(request)
            self.running = []
        return self.kv_cache_manager.reset_prefix_cache()

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def has_requests(self) -> bool:
        """Whether a step would do anything: run requests, or tell the worker which ones have finished."""
        return bool(self.requests or self.finished_req_ids)

    # ---- one step

    def schedule(self) -> SchedulerOutput:
        """Chooses this step's tokens: running requests first, then waiting ones while budget, seats and blocks last."""
        step = self._step = Step(token_budget=self.max_num_batched_tokens)
        nothing_runs = not self.running
        self.schedule_running(step)
        # If a running request needed a preemption to continue, this step admits no new request. A static batch admits
        # requests only when the last batch is over. That condition alone separates it from continuous batching.
        if not step.preempted and (self.batching == "continuous" or nothing_runs):
            self.schedule_waiting(step)
        self._assert_within_limits(step)
        output = self._make_output(step)
        self.advance(step)
        self.num_steps += 1
        self.num_last_scheduled_tokens = output.total_num_scheduled_tokens
        self._in_flight.append(step)
        step.output = output
        if self.max_steps_in_flight > 1:
            self.kv_cache_manager.start_step()
        return output

    def schedule_running(self, step: Step) -> None:
        """Pass 1: gives the running requests the tokens that they lack, in order of admission, while budget is left.

        Each request that gets tokens is recorded in `step` and listed in `step.continued`. A request that lacks no
        token is passed over. If a request had to preempt itself to make room, the pass ends: the ones behind it were
        admitted later, and do not fit either. In a pipeline, the pass takes only its share of the requests.
        """
        i, num_left = 0, self.share_of_step(len(self.running))
        while i < len(self.running) and step.token_budget > 0 and num_left > 0:
            request = self.running[i]
            num_new_tokens = self.num_tokens_to_compute(request, request.num_computed_tokens, step.token_budget)
            if num_new_tokens == 0:
                i += 1
                continue
            new_blocks = self.allocate_or_preempt(request, num_new_tokens, step)
            if new_blocks is None:
                break
            step.record(request, num_new_tokens, new_blocks)
            step.continued.append(request)
            num_left -= 1
            # If a victim stood before this request, the request now has a smaller index.
            i = self.running.index(request) + 1 if step.preempted else i + 1

    def schedule_waiting(self, step: Step) -> None:
        """Pass 2: admits requests from the head of the queue while budget, seats (`max_num_seqs`) and blocks last.

        What the prefix cache holds of a request need not be computed. If the head does not fit the budget or the
        blocks, the pass ends with the queue unchanged: if others could overtake the head, it might wait forever. It
        also ends if the head was preempted while it was in flight, and is so still.
        """
        num_seats = min(len(self.running) + len(self.waiting), self.max_num_seqs)
        # A static batch is admitted whole, because no request joins it later.
        share = num_seats if self.batching == "static" else self.share_of_step(num_seats)
        while self.waiting and step.token_budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting.peek_request()
            if len(step.num_scheduled_tokens) >= share or self.is_in_flight(request):
                break
            hit_blocks, num_hit_tokens = self.kv_cache_manager.get_computed_blocks(request)
            num_new_tokens = self.num_tokens_to_compute(request, num_hit_tokens, step.token_budget)
            if num_new_tokens == 0:
                break
            new_blocks = self.kv_cache_manager.allocate_slots(
                request,
                num_new_tokens,
                hit_blocks,
                full_sequence_must_fit=self.reserve_full_sequence,
                num_new_computed_tokens=num_hit_tokens,
            )
            if new_blocks is None:
                break
            self.waiting.pop_request()
            self.admit(request, num_hit_tokens, step)
            step.record(request, num_new_tokens, new_blocks)

    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        """Returns how many tokens of `request` this step computes, if the first `num_computed_tokens` are in the cache.

        That is what it lacks of its known tokens, prompt and output alike: 1 for a decode, more for a prompt or a
        resumed request. It is cut to `long_prefill_token_threshold` (0: no threshold) and to `token_budget`. If
        chunked prefill is off, a request that exceeds the budget gets 0 instead of a part.
        """
        # num_tokens, not num_prompt_tokens: a resumed request computes its earlier output again.
        missing = request.num_tokens - num_computed_tokens
        if self.long_prefill_token_threshold > 0:
            missing = min(missing, self.long_prefill_token_threshold)
        if missing > token_budget:
            return token_budget if self.enable_chunked_prefill else 0
        return missing

    def admit(self, request: Request, num_hit_tokens: int, step: Step) -> None:
        """Makes `request` the last of the running ones, with `num_hit_tokens` computed, and notes it in `step`."""
        self.kv_cache_manager.record_admission(request, num_hit_tokens)
        (step.resumed if request.status == RequestStatus.PREEMPTED else step.admitted).append(request)
        request.set_status(RequestStatus.RUNNING)
        self.running.append(request)
        request.num_computed_tokens = num_hit_tokens
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_hit_tokens
            request.times.scheduled = time.monotonic()

    # ---- preemption

    def allocate_or_preempt(self, request: Request, num_new_tokens: int, step: Step) -> list[KVCacheBlock] | None:
        """Returns new blocks for `request`, which runs. Preempts victims, one at a time, until they fit.

        Every victim leaves `running`, is listed in `step.preempted`, and what this step had granted it returns to the
        budget (`step.undo`). Returns None if the last victim was `request` itself.
        """
        while True:
            new_blocks = self.kv_cache_manager.allocate_slots(request, num_new_tokens)
            if new_blocks is not None:
                return new_blocks
            victim = self.choose_victim()
            self.running.remove(victim)
            step.undo(victim)
            self.preempt(victim)
            step.preempted.append(victim)
            if victim is request:
                return None

    def choose_victim(self) -> Request:
        """Returns the running request that loses its blocks: the latest admitted, or by priority the least urgent."""
        if self.scheduling_policy == "priority":
            return max(self.running, key=Request.sort_key)
        return self.running[-1]

    def preempt(self, request: Request) -> None:
        """Frees all blocks of `request` and puts it back into the queue, ahead of the requests of its rank.

        It keeps its tokens, and computes their K/V again once it is admitted. The caller takes it out of `running`.
        If a step in flight samples for it, it gets that token while it waits.
        """
        self.kv_cache_manager.preempt(request)
        request.set_status(RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        if not self.awaits_token(request):  # its prompt is computed again, or its prompt_logprobs were delivered
            request.prompt_logprobs = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend_request(request)

    # ---- the message down

    def _make_output(self, step: Step) -> SchedulerOutput:
        scheduled = step.num_scheduled_tokens
        step.finished_req_ids, self.finished_req_ids = self.finished_req_ids, set()
        return SchedulerOutput(
            scheduled_new_reqs=[self._new_request_data(request) for request in step.admitted],
            scheduled_cached_reqs=[
                *(self._cached_request_data(request, step, resumed=False) for request in step.continued),
                *(self._cached_request_data(request, step, resumed=True) for request in step.resumed),
            ],
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            sampling_req_ids=self.choose_sampling(step),
            finished_req_ids=frozenset(step.finished_req_ids),
            preempted_req_ids=frozenset(request.request_id for request in step.preempted),
            block_copies=self.kv_cache_manager.take_block_copies(),
        )

    def choose_sampling(self, step: Step) -> frozenset[str]:
        """Returns the ids of the requests that sample: those whose known tokens are all computed after this step.

        Called before `advance`. A request in mid-prompt does not sample: the token that follows is known already.
        """
        return frozenset(
            request_id
            for request_id, num_tokens in step.num_scheduled_tokens.items()
            if self.requests[request_id].num_computed_tokens + num_tokens >= self.requests[request_id].num_tokens
        )

    def _new_request_data(self, request: Request) -> NewRequestData:
        return NewRequestData(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling_params=request.sampling_params,
            eos_token_id=request.eos_token_id,
            seed=request.seed,
            bad_words_token_ids=request.bad_words_token_ids,
            block_ids=self.kv_cache_manager.get_block_ids(request.request_id),
            num_computed_tokens=request.num_computed_tokens,
            output_token_ids=list(request.output_token_ids),
            extra_eos_token_ids=request.extra_eos_token_ids,
            position_offset=request.position_offset,
        )

    def _cached_request_data(self, request: Request, step: Step, resumed: bool) -> CachedRequestData:
        new_block_ids = ([block.block_id for block in step.new_blocks[request.request_id]],)
        return CachedRequestData(
            request.request_id,
            self.kv_cache_manager.get_block_ids(request.request_id) if resumed else new_block_ids,
            request.num_computed_tokens,
            resumed,
            self._outputs_to_compute(request, step) if self.is_pipelined else (),
        )

    def _outputs_to_compute(self, request: Request, step: Step) -> list[int]:
        """The output tokens of `request` that this step computes. Called before `advance`."""
        start = request.num_computed_tokens
        end = start + step.num_scheduled_tokens[request.request_id]
        return request.all_token_ids[max(start, request.num_prompt_tokens) : end]

    def advance(self, step: Step) -> None:
        """Counts the step's tokens as computed, before it has run: a pipelined engine can schedule the next one now."""
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += num_tokens

    def _assert_within_limits(self, step: Step) -> None:
        assert step.token_budget >= 0
        assert sum(step.num_scheduled_tokens.values()) <= self.max_num_batched_tokens
        assert len(self.running) <= self.max_num_seqs
        assert len(step.num_scheduled_tokens) <= len(self.running)

    # ---- the message up

    def update_from_output(
        self, scheduler_output: SchedulerOutput, runner_output: ModelRunnerOutput
    ) -> list[EngineCoreOutput]:
        """Appends the sampled tokens, stops the requests that are done, and returns what each request got."""
        now = time.monotonic()
        step = self._step = self._take_step(scheduler_output)
        # A request aborted while the step ran is left out, also if a new request has taken its id since.
        in_step = {request.request_id: request for request in self._unfinished(step.requests)}
        step.counters_before = (self.num_prompt_tokens, self.num_generation_tokens)
        step.num_outputs_before = {request: request.num_output_tokens for request in in_step.values()}
        self.kv_cache_manager.end_step(has_run=True)
        outputs = []
        for request_id in scheduler_output.num_scheduled_tokens:
            request = in_step.get(request_id)
            if request is None:
                continue
            sampled = runner_output.sampled_token_ids.get(request_id, [])
            # A request that was preempted meanwhile computes its prompt again, unless it has or gets its first token.
            if sampled or request.status == RequestStatus.RUNNING or self.awaits_token(request):
                request.prompt_logprobs += runner_output.prompt_logprobs.get(request_id, [])
            if sampled:  # a request in mid-prefill never emits anything
                outputs.append(self._append_tokens(request, sampled, runner_output, now))
        return outputs

    def _append_tokens(
        self, request: Request, sampled: list[int], runner_output: ModelRunnerOutput, now: float
    ) -> EngineCoreOutput:
        is_first = request.num_output_tokens == 0
        new_token_ids, stopped = [], False
        for token_id in sampled:
            request.append_output_token_id(token_id)
            new_token_ids.append(token_id)
            stopped = check_stop(request, self.max_model_len)
            if stopped:
                break  # tokens beyond the stop are dropped
        if is_first:
            request.times.first_token = now
            self.num_prompt_tokens += request.num_prompt_tokens
        request.times.last_token = now
        self.num_generation_tokens += len(new_token_ids)
        if stopped:
            self.retire(request)
        logprobs = runner_output.logprobs.get(request.request_id)
        wants_prompt_logprobs = is_first and request.sampling_params.prompt_logprobs is not None
        return EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=new_token_ids,
            new_logprobs=None if logprobs is None else logprobs[: len(new_token_ids)],
            prompt_logprobs=request.prompt_logprobs if wants_prompt_logprobs else None,
            finish_reason=RequestStatus.get_finished_reason(request.status),
            stop_reason=request.stop_reason,
            num_cached_tokens=max(request.num_cached_tokens, 0),
            times=request.times,
        )

    def retire(self, request: Request) -> None:
        """Takes out a request that has stopped with the token just appended. Its seat and its blocks are free at once.

        If the request was preempted while its token was on the way, it is in the queue and not among the running.
        """
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove_requests([request])
        self._free(request)

    def _free(self, request: Request) -> None:
        """Frees the blocks of a finished request at once. The worker drops its state with the next step."""
        assert request.is_finished
        self.kv_cache_manager.free(request)
        self.finished_req_ids.add(request.request_id)
        del self.requests[request.request_id]

    # ---- statistics and integrity

    def make_stats(self) -> EngineStats:
        prefix_cache = self.kv_cache_manager.prefix_cache_stats
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.kv_cache_manager.usage,
            num_used_slots=sum(request.num_computed_tokens for request in self.running),
            num_reserved_slots=self.kv_cache_manager.num_reserved_slots(),
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
            num_scheduled_tokens=self.num_last_scheduled_tokens,
            num_preemptions=self.num_preemptions,
            prefix_cache_queries=prefix_cache.queries,
            prefix_cache_hits=prefix_cache.hits,
            prefix_cache_hit_rate=prefix_cache.hit_rate,
            preempted_prefix_cache_queries=prefix_cache.preempted_queries,
            preempted_prefix_cache_hits=prefix_cache.preempted_hits,
        )

    def check_integrity(self) -> None:
        """Asserts what must hold between steps. It is linear in the blocks, so it is for tests and idle engines."""
        self.kv_cache_manager.check_integrity()
        assert {id(r) for r in self.requests.values()} == {id(r) for r in [*self.running, *self.waiting]}
        assert all(request.status == RequestStatus.RUNNING for request in self.running)
        holders = set(self.kv_cache_manager.req_to_blocks)
        assert holders == {request.request_id for request in self.running}, "only running requests hold blocks"
