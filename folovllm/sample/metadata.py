"""SamplingMetadata: everything the sampler needs to know about one step, as ready tensors.

Milestone: M1. vLLM counterparts: vllm/v1/sample/metadata.py, and the part of vllm/v1/worker/gpu_input_batch.py that
fills it. Left out: keeping the tensors between steps and updating them as requests come and go (they are built anew for
every step, which is simpler and cannot go stale), custom logits processors, and grammars.

Three rules keep the metadata cheap. First, if no request in the batch uses a feature, its field is None and the sampler
skips that step; a batch of plain greedy requests builds no tensor at all. Second, no work here is proportional to the
length of a request, except for requests with penalties, which have to count their tokens. Third, everything is put
together on the host and goes to a GPU in a few copies, none of which the host waits for (folovllm/transfers.py).

Token ids outside the vocabulary are dropped, because they cannot be sampled anyway. The input processor refuses them
earlier, with a message; at this point one bad request must not stop a whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

from folovllm.sample.ops.masks import TokenPairs, banned_by_bad_words, set_cells_, stop_ids_before_min_tokens
from folovllm.sample.ops.penalties import Penalties, build_penalties
from folovllm.sampling_params import SamplingParams
from folovllm.transfers import to_device

# float32 ends at 3e38. Numbers beyond these limits would become inf or 0 and then NaN. At the limits themselves the
# effect of a parameter is already as extreme as it can be.
_SMALLEST, _LARGEST = 1e-20, 1e20
_NO_PENALTY = (1.0, 0.0, 0.0)
# The steps compare in float32, in which a min_p and a top_p beyond these numbers may be 0 and 1, and so off.
_FLOAT32_MIN, _FLOAT32_BELOW_1 = 2.0**-149, 1.0 - 2.0**-24


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits to sample from. A request has one such row per step."""

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]  # what was generated before this row
    eos_token_id: int | None
    seed: int  # always a number: a request without a seed was given one from the engine's generator
    bad_words_token_ids: list[list[int]]  # params.bad_words, tokenised
    extra_eos_token_ids: tuple[int, ...] = ()  # further ids that end a text; only min_tokens asks for them

    @cached_property
    def is_plain(self) -> bool:
        """Whether the row needs only the largest logit, now and in every later step: it is greedy and asks for nothing
        else.
        """
        p = self.params
        return (
            p.is_greedy
            and p.logprobs is None
            and p.allowed_token_ids is None
            and p.min_tokens == 0
            and not p.logit_bias
            and not self.bad_words_token_ids
            and _strengths(p) == _NO_PENALTY
        )


@dataclass(frozen=True)
class SamplingMetadata:
    """The sampling parameters of the batch: R rows in the order of the logits. None means that no row
    uses the feature.
    """

    num_rows: int
    all_greedy: bool  # no row draws
    all_random: bool  # every row draws
    # The draw. Greedy rows in a mixed batch have neutral entries: they go through the steps and come out unchanged.
    temperature: torch.Tensor | None  # [R] float32, 0 for greedy rows. If all_greedy, this whole group is None
    min_p: torch.Tensor | None  # [R] float32, 0 is off
    top_k: torch.Tensor | None  # [R] int64, vocab_size is off
    max_top_k: int  # the largest top_k of the rows that use one; 0 if none does
    top_p: torch.Tensor | None  # [R] float32, 1 is off
    seeds: list[int]  # [R]; empty if all_greedy
    output_indices: list[int]  # [R] how many tokens were generated before; together with `seeds` the key of the noise
    untruncated: list[int]  # the rows that draw from all tokens, without min_p, top_k and top_p
    # Changes to the logits, before anything is drawn.
    allowed_token_ids_mask: torch.Tensor | None  # [R, V] bool; True is *forbidden*, as in vLLM
    bad_words: TokenPairs | None  # the cells that would complete a bad word now
    min_tokens: TokenPairs | None  # the stop ids of requests that are too short to stop
    logit_bias: TokenPairs | None
    penalties: Penalties | None
    # Per row, how many of the most likely tokens to report besides the sampled one. None reports nothing.
    num_logprobs: list[int | None]  # [R]

    @property
    def may_empty_a_row(self) -> bool:
        """Whether some mask applies, so that a row might have no token left."""
        return any(m is not None for m in (self.allowed_token_ids_mask, self.bad_words, self.min_tokens))

    @property
    def changes_logits(self) -> bool:
        """Whether any step changes the logits before greedy rows take their argmax."""
        return self.may_empty_a_row or self.logit_bias is not None or self.penalties is not None

    @property
    def truncates(self) -> bool:
        """Whether some row removes the tail of its distribution."""
        return self.min_p is not None or self.top_k is not None or self.top_p is not None

    @classmethod
    def build(cls, rows: list[SamplingRow], vocab_size: int, device: torch.device | str) -> "SamplingMetadata":
        """Collects the parameters of a step. `rows` are in the order of the logits, and the tensors are on `device`."""
        if all(r.is_plain for r in rows):
            return cls.plain(len(rows))
        is_greedy = [r.params.is_greedy for r in rows]
        draw = [] if all(is_greedy) else rows
        min_ps = [_min_p(r.params) for r in draw]
        top_ps = [_top_p(r.params) for r in draw]
        top_ks = [_top_k(r.params, vocab_size) for r in draw]
        max_top_k = max((k for k in top_ks if k < vocab_size), default=0)
        numbers = _in_one_copy(
            device,
            temperature=[min(r.params.temperature, _LARGEST) for r in draw],
            min_p=min_ps if any(min_ps) else [],
            top_p=top_ps if min(top_ps, default=1.0) < 1.0 else [],
        )
        return cls(
            num_rows=len(rows),
            all_greedy=not draw,
            all_random=not any(is_greedy),
            temperature=numbers.get("temperature"),
            min_p=numbers.get("min_p"),
            top_k=to_device(top_ks, device, torch.int64) if max_top_k > 0 else None,
            max_top_k=max_top_k,
            top_p=numbers.get("top_p"),
            seeds=[r.seed for r in draw],
            output_indices=[len(r.output_token_ids) for r in draw],
            untruncated=_untruncated(is_greedy, min_ps, top_ps, top_ks, vocab_size),
            allowed_token_ids_mask=_allowed_mask(rows, vocab_size, device),
            bad_words=TokenPairs.build(_cells(rows, vocab_size, _bad_words), device),
            min_tokens=TokenPairs.build(_cells(rows, vocab_size, _too_early), device),
            logit_bias=_logit_bias(rows, vocab_size, device),
            penalties=_penalties(rows, vocab_size, device),
            num_logprobs=[None if r.params.logprobs is None else min(r.params.logprobs, vocab_size) for r in rows],
        )

    def untruncated_in(self, rows: slice) -> list[int]:
        """Returns the places of `untruncated` in a group of rows."""
        return [i - rows.start for i in self.untruncated if rows.start <= i < rows.stop]

    def select(self, rows: Sequence[int]) -> "SamplingMetadata":
        """Returns what the draw of some rows needs. The changes that come before it, and the logprobs, are left out."""
        assert self.temperature is not None
        index = to_device(rows, self.temperature.device)  # [n]
        return replace(
            self.plain(len(rows)),
            all_greedy=False,
            temperature=self.temperature[index],
            min_p=None if self.min_p is None else self.min_p[index],
            top_k=None if self.top_k is None else self.top_k[index],
            max_top_k=self.max_top_k,
            top_p=None if self.top_p is None else self.top_p[index],
            seeds=[self.seeds[i] for i in rows],
            output_indices=[self.output_indices[i] for i in rows],
        )

    @classmethod
    @cache
    def plain(cls, num_rows: int) -> "SamplingMetadata":
        """Returns the metadata of greedy rows that ask for nothing else. Most batches are of this kind, so it must be
        fast.
        """
        return cls(
            num_rows=num_rows,
            all_greedy=True,
            all_random=num_rows == 0,
            temperature=None,
            min_p=None,
            top_k=None,
            max_top_k=0,
            top_p=None,
            seeds=[],
            output_indices=[],
            untruncated=[],
            allowed_token_ids_mask=None,
            bad_words=None,
            min_tokens=None,
            logit_bias=None,
            penalties=None,
            num_logprobs=[None] * num_rows,
        )


def _in_one_copy(device: torch.device | str, **lists: list[float]) -> dict[str, torch.Tensor]:
    """Returns the lists that are not empty as float32 tensors, by name. They are of one length and cross together."""
    used = {name: values for name, values in lists.items() if values}
    if not used:
        return {}
    return dict(zip(used, to_device(list(used.values()), device, torch.float32).unbind(0), strict=True))


def _min_p(params: SamplingParams) -> float:
    """Returns the min_p of a row, 0 for greedy rows, which do not draw."""
    return 0.0 if params.is_greedy or params.min_p < _FLOAT32_MIN else params.min_p


def _top_p(params: SamplingParams) -> float:
    """Returns the top_p of a row, 1 for greedy rows."""
    return 1.0 if params.is_greedy or params.top_p > _FLOAT32_BELOW_1 else params.top_p


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    """Returns the k of a row. 0, -1 and more than the vocabulary mean all tokens; greedy rows do not draw."""
    return vocab_size if params.is_greedy or params.top_k <= 0 else min(params.top_k, vocab_size)


def _untruncated(
    is_greedy: list[bool], min_ps: list[float], top_ps: list[float], top_ks: list[int], vocab_size: int
) -> list[int]:
    """Returns the rows that draw with min_p, top_p and top_k off."""
    steps = zip(is_greedy, min_ps, top_ps, top_ks, strict=bool(top_ks))  # the latter three are empty if no row draws
    return [i for i, step in enumerate(steps) if step == (False, 0.0, 1.0, vocab_size)]


def _cells(
    rows: list[SamplingRow], vocab_size: int, token_ids_of: Callable[[SamplingRow], list[int]]
) -> list[tuple[int, int]]:
    """Returns (row number, token id) for every id that `token_ids_of(row)` names and the vocabulary contains."""
    return [(i, t) for i, row in enumerate(rows) for t in token_ids_of(row) if 0 <= t < vocab_size]


def _bad_words(row: SamplingRow) -> list[int]:
    return banned_by_bad_words(row.bad_words_token_ids, row.output_token_ids)


def _too_early(row: SamplingRow) -> list[int]:
    stop_ids = (*row.extra_eos_token_ids, *(row.params.stop_token_ids or ()))
    return stop_ids_before_min_tokens(row.params.min_tokens, len(row.output_token_ids), row.eos_token_id, stop_ids)


def _allowed_mask(rows: list[SamplingRow], vocab_size: int, device: torch.device | str) -> torch.Tensor | None:
    """Returns a mask `[R, V]` that is True where a row's allowed_token_ids lack the token, or None if
    no row has them.
    """
    if all(r.params.allowed_token_ids is None for r in rows):
        return None
    is_restricted = to_device([r.params.allowed_token_ids is not None for r in rows], device)  # [R]
    mask = is_restricted.unsqueeze(1).repeat(1, vocab_size)  # [R, V]
    allowed = TokenPairs.build(_cells(rows, vocab_size, lambda r: r.params.allowed_token_ids or []), device)
    if allowed is not None:
        set_cells_(mask, allowed, False)
    return mask


def _logit_bias(rows: list[SamplingRow], vocab_size: int, device: torch.device | str) -> TokenPairs | None:
    cells = _cells(rows, vocab_size, lambda r: list(r.params.logit_bias or ()))
    return TokenPairs.build(cells, device, values=[(rows[i].params.logit_bias or {})[t] for i, t in cells])


def _strengths(params: SamplingParams) -> tuple[float, float, float]:
    """Returns (repetition, frequency, presence)."""
    repetition = min(max(params.repetition_penalty, _SMALLEST), _LARGEST)
    return repetition, params.frequency_penalty, params.presence_penalty


def _penalties(rows: list[SamplingRow], vocab_size: int, device: torch.device | str) -> Penalties | None:
    strengths = [_strengths(r.params) for r in rows]
    penalised = [i for i, s in enumerate(strengths) if s != _NO_PENALTY]
    if not penalised:
        return None
    return build_penalties(
        penalised,
        [rows[i].prompt_token_ids for i in penalised],
        [rows[i].output_token_ids for i in penalised],
        [strengths[i] for i in penalised],
        vocab_size,
        device,
    )
