"""ModelRunner: turns a SchedulerOutput into tensors, runs the model, samples, and answers with plain data.

Milestone: M1, M9 (stages). vLLM counterpart: vllm/v1/worker/gpu_model_runner.py.
Left out: CUDA graphs, several KV groups, drafts, LoRA, multimodal inputs.

The batch is flat: the new tokens of all requests one after another, without padding. The runner never asks whether a
request is in prefill or decode; it only knows how many tokens are computed and how many are new. The model returns the
hidden states of the rows that are read next, and no others: the last row of each request that samples, and all rows of
a request that wants prompt logprobs.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from folovllm import transfers
from folovllm.attention.backend import AttentionBackend, AttentionMetadata
from folovllm.config import EngineConfig, KernelConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from folovllm.distributed.communicator import ONE_RANK, ParallelGroups
from folovllm.forward_context import set_forward_context
from folovllm.model_executor.cpu.huge_pages import huge_zeros, touch_pages
from folovllm.model_executor.models.interface import CausalLM
from folovllm.outputs import ModelRunnerOutput
from folovllm.sample.logprobs import RankedLogprobs, logprobs_to_host, rank_logprobs
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.sampler import Sampler
from folovllm.worker.input_batch import CachedRequestState, InputBatch
from folovllm.worker.input_buffers import InputBuffers
from folovllm.worker.pipeline_stage import PipelineStage

# Rows of prompt logits computed at once: [256, 49152] in fp32 is 48 MiB.
PROMPT_LOGPROBS_CHUNK = 256
# How much of the KV cache `touch_kv_pages` writes at start: what some dozens of requests need, unless the host is slow.
TOUCH_BYTES, TOUCH_SECONDS = 256 * 2**20, 0.4


@dataclass(frozen=True)
class ForwardHandle:
    """A step between `execute` and `sample`."""

    scheduler_output: SchedulerOutput
    hidden_states: torch.Tensor  # [num_selected, hidden_size]
    row_start_loc: list[int]  # [num_reqs + 1]: where the rows of each request begin in hidden_states


class ModelRunner:
    """Owns the model, the KV cache tensor and the batch of the requests that run.

    Of several ranks each has a runner, and all runners get the same steps. Those of the last stage sample.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: CausalLM,
        backend: AttentionBackend,
        device: torch.device,
        sampler: Sampler,
        groups: ParallelGroups = ONE_RANK,
    ) -> None:
        self.config = config
        self.model = model
        self.backend = backend
        self.device = device
        self.sampler = sampler
        arch = config.model_config.arch
        self.vocab_size = arch.vocab_size
        self.is_last_stage = groups.shard.is_last_stage
        self.stage = PipelineStage(groups, arch.hidden_size, backend.spec.dtype) if groups.pp.size > 1 else None
        self.is_pipelined = config.parallel_config.pipeline_parallel_size > 1
        self.requests: dict[str, CachedRequestState] = {}
        self.batch = InputBatch(config.max_num_seqs, config.max_model_len, config.block_size, config.parts)
        self.num_prompt_logprobs: dict[str, int] = {}  # of the requests that want them
        self.buffers = InputBuffers(config.max_num_batched_tokens, self.batch.block_table, device)
        self.kv_caches = torch.empty(0)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocates one tensor [num_layers, *backend.kv_cache_shape], and gives each layer its slice."""
        layers = self.model.attention_layers()
        shape = (len(layers), *self.backend.kv_cache_shape(kv_cache_config.num_blocks))
        self.kv_caches = _zeros(shape, self.backend.spec.dtype, self.device, self.config.kernel_config)
        for layer, kv_cache in zip(layers, self.kv_caches, strict=True):
            layer.bind(self.backend, kv_cache)

    # ---- execute: state, inputs, forward pass

    @torch.inference_mode()
    def execute(self, scheduler_output: SchedulerOutput) -> ForwardHandle:
        """Runs the forward pass of a step. An empty step only updates state."""
        self._update_states(scheduler_output)
        if scheduler_output.block_copies:
            self.backend.copy_blocks(self.kv_caches, scheduler_output.block_copies)
        if scheduler_output.is_empty:
            return ForwardHandle(scheduler_output, torch.empty(0), [0])
        metadata, num_tokens, row_start_loc = self._prepare_inputs(scheduler_output)
        inputs = self.buffers.input_ids[:num_tokens], self.buffers.positions[:num_tokens]
        with set_forward_context(metadata):
            hidden_states = self.model(*inputs) if self.stage is None else self.stage.run(self.model, *inputs)
        if len(hidden_states) != row_start_loc[-1]:
            raise ValueError(
                f"{type(self.model).__name__} returned {len(hidden_states)} rows of hidden states and "
                f"{row_start_loc[-1]} were selected: return the rows of AttentionMetadata.logits_indices, as "
                "LlamaModel.run_layers does"
            )
        return ForwardHandle(scheduler_output, hidden_states, row_start_loc)

    def _update_states(self, output: SchedulerOutput) -> None:
        """Updates requests and batch. A request that is not scheduled leaves the batch but keeps its state."""
        self.batch.begin_changes()
        for request_id in output.finished_req_ids:
            self.requests.pop(request_id, None)
            self.num_prompt_logprobs.pop(request_id, None)
        for request_id in [r for r in self.batch.req_ids if r not in output.num_scheduled_tokens]:
            self.batch.remove_request(request_id)
        for new in output.scheduled_new_reqs:
            self.batch.remove_request(new.request_id)  # an id may come back after an abort that freed it
            self._add(self._new_state(new))
            self.num_prompt_logprobs.pop(new.request_id, None)
            if new.sampling_params.prompt_logprobs is not None:
                self.num_prompt_logprobs[new.request_id] = new.sampling_params.prompt_logprobs
        for cached in output.scheduled_cached_reqs:
            request = self.requests[cached.request_id]
            (new_block_ids,) = cached.new_block_ids
            if cached.resumed:
                request.block_ids = []
            request.block_ids += new_block_ids  # in place: copying a long table in every step would add up
            request.num_computed_tokens = cached.num_computed_tokens
            if self.is_pipelined:
                self._learn_tokens(request, cached, output)
            self._refresh(request, new_block_ids, cached.resumed)
        self.batch.end_changes()

    @staticmethod
    def _new_state(new: NewRequestData) -> CachedRequestState:
        return CachedRequestState(
            new, list(new.block_ids[0]), new.num_computed_tokens, output_token_ids=list(new.output_token_ids)
        )

    def _add(self, request: CachedRequestState) -> None:
        self.requests[request.data.request_id] = request
        self.batch.add_request(request)

    def _learn_tokens(self, request: CachedRequestState, cached: CachedRequestData, output: SchedulerOutput) -> None:
        """Appends the output tokens of this step that this rank has not sampled itself: only the last stage samples."""
        num_scheduled = output.num_scheduled_tokens[cached.request_id]
        for token_id in cached.unknown_tokens(request.num_tokens, num_scheduled):
            request.output_token_ids.append(token_id)
            if cached.request_id in self.batch.row_of:
                self.batch.append_token(cached.request_id, token_id)

    def _refresh(self, request: CachedRequestState, new_block_ids: list[int], resumed: bool) -> None:
        row = self.batch.row_of.get(request.data.request_id)
        if row is None:
            self.batch.add_request(request)
            return
        self.batch.num_computed_tokens[row] = request.num_computed_tokens
        if resumed:
            self.batch.block_table.add_row(new_block_ids, row)
        elif new_block_ids:
            self.batch.block_table.append_row(new_block_ids, row)

    def _prepare_inputs(self, output: SchedulerOutput) -> tuple[AttentionMetadata, int, list[int]]:
        """Fills the input buffers. Returns the metadata, the number of tokens, and ForwardHandle's row_start_loc.

        E.g. for requests with 2, 1 and 3 new tokens and 5, 9 and 0 computed ones:

        rows      = [0, 0, 1, 2, 2, 2]
        positions = [5, 6, 9, 0, 1, 2]
        """
        batch, num_reqs = self.batch, self.batch.num_reqs
        assert num_reqs == len(output.num_scheduled_tokens)
        num_scheduled = np.array([output.num_scheduled_tokens[r] for r in batch.req_ids])  # [num_reqs]
        query_start_loc = np.zeros(num_reqs + 1, dtype=np.int64)
        num_scheduled.cumsum(out=query_start_loc[1:])
        num_tokens = int(query_start_loc[-1])
        rows = np.repeat(np.arange(num_reqs), num_scheduled)  # [num_tokens]
        computed = batch.num_computed_tokens[:num_reqs]  # [num_reqs]
        positions = np.arange(num_tokens) - query_start_loc[rows] + computed[rows]  # [num_tokens]
        slots = batch.block_table.slot_mapping(rows, positions)  # [num_tokens]
        self.buffers.fill(batch.token_ids[rows, positions], positions + batch.position_offset[rows], slots)
        logits_indices, row_start_loc = self._select_rows(output, query_start_loc)
        seq_lens = (computed + num_scheduled).tolist()
        metadata = AttentionMetadata(
            query_start_loc=query_start_loc.tolist(),
            seq_lens=seq_lens,
            block_table=self.buffers.block_table(batch.block_table, seq_lens),
            slot_mapping=self.buffers.slot_mapping[:num_tokens],
            block_size=batch.block_table.block_size,
            logits_indices=logits_indices,
        )
        self.backend.prepare(metadata)
        return metadata, num_tokens, row_start_loc

    def _select_rows(
        self, output: SchedulerOutput, query_start_loc: np.ndarray
    ) -> tuple[torch.Tensor | None, list[int]]:
        """The rows that are read after the forward pass (None: all), and where those of each request begin among them.

        E.g. with query_start_loc [0, 2, 3, 6], if request 0 is in mid-prompt, request 1 samples and request 2 wants
        prompt logprobs:

        counts         = [0, 1, 3]
        logits_indices = [2, 3, 4, 5]
        row_start_loc  = [0, 0, 1, 4]

        A stage that is not the last reads none and sends all.
        """
        if not self.is_last_stage:
            return None, [0]
        num_tokens = int(query_start_loc[-1])
        if num_tokens == len(output.sampling_req_ids):  # every request has one token and samples
            return None, query_start_loc.tolist()
        num_new = np.diff(query_start_loc).tolist()
        counts = [self._num_rows_read(r, n, output) for r, n in zip(self.batch.req_ids, num_new, strict=True)]
        row_start_loc = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=row_start_loc[1:])
        num_selected = int(row_start_loc[-1])
        if num_selected == num_tokens:
            return None, row_start_loc.tolist()
        # The rows of a request are its last ones: those that end where the request ends.
        shift = query_start_loc[1:] - row_start_loc[1:]  # [num_reqs]
        indices = np.arange(num_selected) + np.repeat(shift, counts)  # [num_selected]
        return transfers.to_device(indices, self.device), row_start_loc.tolist()

    def _num_rows_read(self, request_id: str, num_new: int, output: SchedulerOutput) -> int:
        if request_id in self.num_prompt_logprobs and not self.requests[request_id].output_token_ids:
            return num_new
        return int(request_id in output.sampling_req_ids)

    # ---- sample

    @torch.inference_mode()
    def sample(self, handle: ForwardHandle) -> ModelRunnerOutput:
        """Samples for the requests whose known tokens are all computed; logits are computed for their last rows.

        A stage that is not the last has an empty answer.
        """
        if not self.is_last_stage:
            return ModelRunnerOutput({})
        result = ModelRunnerOutput({request_id: [] for request_id in handle.scheduler_output.num_scheduled_tokens})
        ranked = self._rank_prompts(handle)
        self._sample(handle, result)
        if ranked:  # read last: the sampler's results are there, so these are, too, and the host hardly waits
            logprobs = iter(logprobs_to_host([group for groups in ranked.values() for group in groups]))
            for request_id, groups in ranked.items():
                result.prompt_logprobs[request_id] = list(islice(logprobs, sum(len(g.counts) for g in groups)))
        return result

    def _sample(self, handle: ForwardHandle, result: ModelRunnerOutput) -> None:
        """Adds the sampled tokens to `result`, and to the requests."""
        output = handle.scheduler_output
        sampling = [(i, r) for i, r in enumerate(self.batch.req_ids) if r in output.sampling_req_ids]
        if not sampling:
            return
        last_rows = [handle.row_start_loc[i + 1] - 1 for i, _ in sampling]
        hidden_states = handle.hidden_states  # [num_selected, hidden_size]
        if len(last_rows) < len(hidden_states):
            hidden_states = hidden_states.index_select(0, transfers.to_device(last_rows, self.device))
        logits = self.model.compute_logits(hidden_states)  # [num_sampling, vocab_size]
        sampling_rows = [self.requests[request_id].sampling_row for _, request_id in sampling]
        sampler_output = self.sampler(logits, SamplingMetadata.build(sampling_rows, self.vocab_size, self.device))
        token_ids = sampler_output.sampled_token_ids
        for (_, request_id), token_id, logprobs in zip(sampling, token_ids, sampler_output.logprobs, strict=True):
            result.sampled_token_ids[request_id] = [token_id]
            if logprobs is not None:
                result.logprobs[request_id] = [logprobs]
            self.requests[request_id].output_token_ids.append(token_id)
            self.batch.append_token(request_id, token_id)

    def _rank_prompts(self, handle: ForwardHandle) -> dict[str, list[RankedLogprobs]]:
        """Ranks the prompt tokens that this step's positions predict, for the requests that want their logprobs."""
        predicted = self._predicted(handle)
        if not predicted:
            return {}
        ends = np.cumsum([len(token_ids) for _, _, token_ids in predicted]).tolist()
        all_ids = [token_id for _, _, token_ids in predicted for token_id in token_ids]
        targets = transfers.to_device(all_ids, self.device, torch.int64)  # [num_targets]
        ranked = {}
        for (request_id, start, token_ids), end in zip(predicted, ends, strict=True):
            rows = handle.hidden_states[start : start + len(token_ids)]  # [num_targets of the request, hidden_size]
            own = targets[end - len(token_ids) : end]  # [num_targets of the request]
            ranked[request_id] = self._rank(rows, own, self.num_prompt_logprobs[request_id])
        return ranked

    def _predicted(self, handle: ForwardHandle) -> list[tuple[str, int, list[int]]]:
        """Returns (request id, first of its rows, token ids that its rows predict) of each request that wants them."""
        wanted = []
        for request_id in self.num_prompt_logprobs:
            request, i = self.requests[request_id], self.batch.row_of.get(request_id)
            if i is None or request.output_token_ids:
                continue
            first = request.num_computed_tokens  # this position predicts the token after it
            start, end = handle.row_start_loc[i : i + 2]
            token_ids = request.data.prompt_token_ids[first + 1 : first + 1 + end - start]
            wanted.append((request_id, start, token_ids))
        return wanted

    def _rank(self, hidden_states: torch.Tensor, targets: torch.Tensor, num_logprobs: int) -> list[RankedLogprobs]:
        """Ranks the logprobs of `hidden_states` [n, hidden_size] beside those of `targets` [n]."""
        ranked: list[RankedLogprobs] = []
        for start in range(0, len(targets), PROMPT_LOGPROBS_CHUNK):
            chunk = slice(start, start + PROMPT_LOGPROBS_CHUNK)
            logprobs = self.model.compute_logits(hidden_states[chunk]).float().log_softmax(dim=-1)  # [n, vocab_size]
            ranked += rank_logprobs(logprobs, targets[chunk], [num_logprobs] * len(logprobs))
        return ranked


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kernels: KernelConfig) -> torch.Tensor:
    """Zeros `[num_layers, ...]`. On a CPU torch.zeros would write all of it at start, even what is never used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    zeros = huge_zeros(shape, dtype, kernels.huge_pages)
    if kernels.touch_kv_pages:
        touch_pages(zeros, TOUCH_BYTES, TOUCH_SECONDS)
    return zeros
