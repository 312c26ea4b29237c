"""Sampler: from logits to the next token of every row, in vLLM's order of operations.

Milestone: M1. vLLM counterpart: vllm/v1/sample/sampler.py (the same method names).
Left out: custom logits processors, grammars, verification of draft tokens.

The model returns one number per token of the vocabulary, the *logits*, and softmax turns them into probabilities. The
sampling parameters apply between the two. The order matters for the starred steps (dividing by a temperature before or
after subtracting a penalty is not the same); the masks commute with everything, because -inf stays -inf.

     1  logprobs are taken from the logits as the model gave them (mode "raw_...")
     2  float32
     3  allowed_token_ids   the others become -inf
     4  bad_words           what would complete one becomes -inf
     5  min_tokens          EOS and stop ids become -inf while the output is too short
     6  logit_bias       *  added
     7  penalties        *  repetition, then frequency, then presence
     8  greedy rows take the argmax; if all rows are greedy, this is the end
     9  random rows         temperature * -> min_p * -> top_k * -> top_p * -> draw
    10  merge: every row takes the result of its own kind
    11  logprobs of the sampled token and of the most likely ones are collected

Every step works on all rows at once and on each row alone: what a row gets never depends on the other rows. (On a GPU
this holds up to the order in which a kernel sums a row, which may depend on the shape of the batch.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from folovllm.outputs import TokenLogprobs
from folovllm.sample.logprobs import RankedLogprobs, logprobs_to_lists, rank_logprobs
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops import fused, masks, noise, penalties, topk_topp
from folovllm.sample.ops.select import first_argmax
from folovllm.sample.ops.shortlist import Shortlist
from folovllm.sampling_params import GREEDY_EPSILON
from folovllm.transfers import to_device, to_host

LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
SamplerBackend = Literal["torch", "shortlist", "cpp"]
LOGPROBS_MODES: tuple[LogprobsMode, ...] = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")
_STEP_9 = ("apply_temperature_", "apply_min_p_", "apply_top_k_", "apply_top_p_", "exponential_noise", "random_sample")
_GROUP_ELEMENTS = 2**19  # 2 MB of float32


@dataclass(frozen=True)
class SamplerOutput:
    """The result of a step as plain data, with one entry per row of logits."""

    sampled_token_ids: list[int]
    logprobs: list[TokenLogprobs | None]  # None for rows that did not ask


class Sampler:
    """Chooses the next token of each row. The sampler has no state: the noise is keyed by the metadata (ops/noise.py).

    `logprobs_mode` decides what is reported as logprobs: log-probabilities or plain logits, either as the model
    returned them ("raw") or after masks, bias, penalties, temperature and truncation ("processed").

    `backend` decides how step 9 is computed; the tokens are the same, bit for bit. "torch" follows the definitions
    (ops/topk_topp.py), "shortlist" sorts only the largest logits (ops/shortlist.py), and "cpp" takes one pass in C++
    (ops/fused.py). M4 turns the latter two on, through `use_backend`.

    Each part of step 9 is a method, so that a subclass can replace it (see `own_steps`). The methods are the functions
    of ops/topk_topp.py and ops/noise.py, where each is documented.
    """

    backend: SamplerBackend = "torch"
    _ops: Any | None = None

    apply_temperature_ = staticmethod(topk_topp.apply_temperature_)
    apply_min_p_ = staticmethod(topk_topp.apply_min_p_)
    apply_top_k_ = staticmethod(topk_topp.apply_top_k_)
    apply_top_p_ = staticmethod(topk_topp.apply_top_p_)
    exponential_noise = staticmethod(noise.exponential_noise)

    def __init__(self, logprobs_mode: LogprobsMode = "raw_logprobs") -> None:
        if logprobs_mode not in LOGPROBS_MODES:
            raise ValueError(f"logprobs_mode must be one of {', '.join(LOGPROBS_MODES)}, got {logprobs_mode!r}")
        self.logprobs_mode = logprobs_mode

    def use_backend(self, backend: SamplerBackend, ops: Any | None = None) -> None:
        """Computes step 9 and the argmax by `backend`; "cpp" needs our C++ operators, `ops`."""
        assert (backend == "cpp") == (ops is not None), backend
        self.backend, self._ops = backend, ops

    @classmethod
    def own_steps(cls) -> list[str]:
        """Returns the methods of step 9 that this class does not have from `Sampler`.

        The backends "shortlist" and "cpp" compute step 9 without these methods, so a class that replaces one of them
        must run with "torch".
        """
        return [name for name in _STEP_9 if getattr(cls, name) is not getattr(Sampler, name)]

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        return self.forward(logits, metadata)

    @torch.inference_mode()
    def forward(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Samples one token per row.

        Args:
            logits: `[R, V]` in the model's dtype. Never modified.
            metadata: built for the same R rows.
        """
        assert logits.shape[0] == metadata.num_rows, (logits.shape, metadata.num_rows)
        processed = logits  # [R, V]
        if metadata.changes_logits or not metadata.all_greedy:
            processed = logits.to(torch.float32, copy=True)  # our own copy, which the steps edit in place
        self.apply_logits_processors(processed, metadata)
        sampled = self.sample(processed, metadata)  # [R]
        # vLLM takes the raw logprobs before step 2, because its sampler edits the logits. They are still there here.
        source = logits if self.logprobs_mode.startswith("raw") else processed  # [R, V]
        wanted = [i for i, k in enumerate(metadata.num_logprobs) if k is not None]
        token_ids, logprobs = self._to_host(sampled, source, wanted, metadata)
        undecided = [i for i, token_id in enumerate(token_ids) if token_id < 0]
        if undecided:
            self.sample_again_(sampled, processed, metadata, undecided)
            token_ids, corrected = self._to_host(sampled, source, [i for i in undecided if i in logprobs], metadata)
            logprobs |= corrected
        return SamplerOutput(token_ids, [logprobs.get(i) for i in range(metadata.num_rows)])

    def apply_logits_processors(self, logits: torch.Tensor, metadata: SamplingMetadata) -> None:
        """Applies steps 3-7, in place. These are the changes that greedy rows see, too.

        If the masks remove the last token of a row (for example, the only allowed token is EOS and min_tokens forbids
        it), the row does not fail. It takes its best allowed token regardless of bad words and min_tokens, or its best
        token at all if no allowed token is in the vocabulary. Other rows are not affected.
        """
        choice = masks.unmasked_choice(logits) if metadata.may_empty_a_row else None  # [R]
        if metadata.allowed_token_ids_mask is not None:
            masks.apply_allowed_token_ids_(logits, metadata.allowed_token_ids_mask)
            choice = masks.unmasked_choice(logits, fallback=choice)
        for cells in (metadata.bad_words, metadata.min_tokens):
            if cells is not None:
                masks.mask_tokens_(logits, cells)
        if metadata.logit_bias is not None:
            masks.apply_logit_bias_(logits, metadata.logit_bias)
        if metadata.penalties is not None:
            penalties.apply_penalties_(logits, metadata.penalties)
        if choice is not None:
            masks.revive_empty_rows_(logits, choice)

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Runs steps 8-10 and returns token ids `[R]`, without waiting for a GPU.

        The backends "shortlist" and "cpp" return -1 for a row that they cannot decide, for example because rounding
        might. Such a row of `logits [R, V]` is left as it is, for `sample_again_`. Other rows are edited in place
        (temperature, truncation), as far as the logprobs_mode shows it.
        """
        greedy = None if metadata.all_random else self.greedy_sample(logits)  # [R]
        if metadata.temperature is None:
            return self.greedy_sample(logits) if greedy is None else greedy  # the first case is a batch without rows
        drawn = None if self._ops is None else fused.sample_(logits, metadata, self._ops)  # [R]
        if drawn is None:
            uses_list = metadata.truncates and self.backend != "torch"
            draw = self._sample_from_list if uses_list else self._sample_rows
            drawn = torch.cat([draw(logits[g], metadata, g) for g in _row_groups(logits)])
        return drawn if greedy is None else torch.where(metadata.temperature < GREEDY_EPSILON, greedy, drawn)

    def sample_again_(
        self, sampled: torch.Tensor, logits: torch.Tensor, metadata: SamplingMetadata, rows: list[int]
    ) -> None:
        """Draws the rows that `sample` could not decide, by the definitions. Writes their tokens into `sampled [R]`.

        The rows of `logits [R, V]` are as they were before step 9, and are edited in place.
        """
        for g in _row_groups(logits, len(rows)):
            index = to_device(rows[g], logits.device)  # [n]
            part = logits[index]  # [n, V]
            drawn = self._sample_rows(part, metadata.select(rows[g]), slice(None))  # [n]
            logits.index_copy_(0, index, part)
            sampled.index_copy_(0, index, drawn)

    def _sample_from_list(self, logits: torch.Tensor, metadata: SamplingMetadata, rows: slice) -> torch.Tensor:
        """Runs step 9 with a shortlist for a group of rows and returns `[n]`, with -1 for rows without a proof.

        These rows of `logits [n, V]` stay as they are, and so do all rows if no logprobs show the difference.
        """
        edited = logits.clone()  # [n, V]
        drawn = self._sample_rows(edited, metadata, rows, from_list=True)  # [n]
        if self.logprobs_mode.startswith("processed"):
            torch.where((drawn < 0).unsqueeze(1), logits, edited, out=logits)
        return drawn

    def _sample_rows(
        self, logits: torch.Tensor, metadata: SamplingMetadata, rows: slice, from_list: bool = False
    ) -> torch.Tensor:
        """Runs step 9 in torch for a group of rows and returns `[n]`. `logits [n, V]` are edited."""
        assert metadata.temperature is not None
        self.apply_temperature_(logits, metadata.temperature[rows])
        # Both have the same four methods.
        steps: Sampler | Shortlist = Shortlist.build(logits, metadata.untruncated_in(rows)) if from_list else self
        if metadata.min_p is not None:
            steps.apply_min_p_(logits, metadata.min_p[rows])
        if metadata.top_k is not None:
            steps.apply_top_k_(logits, metadata.top_k[rows], metadata.max_top_k)
        if metadata.top_p is not None:
            steps.apply_top_p_(logits, metadata.top_p[rows])
        return steps.random_sample(logits.softmax(dim=-1), metadata.seeds[rows], metadata.output_indices[rows])

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        """Draws one token per row of `probs [R, V]` by the exponential race of ops/noise.py. Returns `[R]`."""
        return topk_topp.race(probs, self.exponential_noise(seeds, output_indices, probs.shape[-1], probs.device))

    def greedy_sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the most likely token of each row of `logits [R, V]`, the lowest id among equals, as `[R]`."""
        return first_argmax(logits, self._ops)

    @staticmethod
    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        """Returns the log softmax in float32, `[n, V]` for `[n, V]`."""
        return logits.log_softmax(dim=-1, dtype=torch.float32)

    def _to_host(
        self, sampled: torch.Tensor, source: torch.Tensor, rows: list[int], metadata: SamplingMetadata
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Returns the ids `sampled [R]`, and the logprobs of some rows by row number. Here the host waits for a GPU.

        `source [R, V]` are the logits that the logprobs are taken from. Nothing is computed for the other rows.
        """
        ranked = self._rank_rows(source, sampled, rows, metadata) if rows else []
        ids, *rest = to_host(sampled, *(t for group in ranked for t in group.tensors))
        return ids.tolist(), dict(zip(rows, logprobs_to_lists(ranked, rest), strict=True))

    def _rank_rows(
        self, source: torch.Tensor, sampled: torch.Tensor, rows: list[int], metadata: SamplingMetadata
    ) -> list[RankedLogprobs]:
        """Runs step 11 for some rows of `source [R, V]`."""
        counts = [metadata.num_logprobs[i] or 0 for i in rows]
        index = to_device(rows, source.device) if len(rows) < len(source) else None  # [W]
        ranked: list[RankedLogprobs] = []
        for g in _row_groups(source, len(rows)):
            at = g if index is None else index[g]
            values = source[at]  # [n, V]
            values = self.compute_logprobs(values) if self.logprobs_mode.endswith("logprobs") else values.float()
            ranked += rank_logprobs(values, sampled[at], counts[g])
        return ranked


def _row_groups(logits: torch.Tensor, num_rows: int | None = None) -> list[slice]:
    """Splits rows (all of `logits [R, V]`, or `num_rows` like them) into small groups. Rows do not depend on each
    other.

    The steps on a group allocate half a dozen tensors of its size. For 32 rows each would be 6 MB, which malloc takes
    from the system and returns every time, and the page faults would cost more than the arithmetic: 10 of 17 ms. On a
    GPU, whose allocator keeps its memory, one group is best.
    """
    total = len(logits) if num_rows is None else num_rows
    size = max(1, _GROUP_ELEMENTS // logits.shape[-1]) if logits.device.type == "cpu" else max(1, total)
    return [slice(start, start + size) for start in range(0, total, size)]
