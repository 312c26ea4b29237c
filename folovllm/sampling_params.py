"""SamplingParams: how the next token of a request is chosen and when the request stops.

Milestone: M0. vLLM counterpart: vllm/sampling_params.py (field names, defaults and ranges are vLLM's).
Left out: beam search, structured output, logits processors (milestones after M7).

Row 0: plain data, no torch.
"""

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from folovllm.checks import check_bool, check_int, check_number
from folovllm.utils import unknown_name_message

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy
MIN_RANDOM_TEMPERATURE = 1e-2  # dividing by less overflows; vLLM raises smaller ones to this as well


class RequestOutputKind(enum.Enum):
    """What a RequestOutput holds while a request streams."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last output
    FINAL_ONLY = 2  # nothing until the request has finished


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of one request. Every field has vLLM's name, default and range.

    Raises ValueError for a value out of range. The message names the field, the value and the range.
    """

    n: int = 1  # answers to one prompt
    presence_penalty: float = 0.0  # taken once from the logit of every token in the answer so far
    frequency_penalty: float = 0.0  # taken from it for each time that the token occurred
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely
    temperature: float = 1.0  # 0: always the likeliest token (greedy)
    top_p: float = 1.0  # the smallest set of likeliest tokens whose probabilities reach this sum
    top_k: int = 0  # 0 and -1 both mean "all tokens"
    min_p: float = 0.0  # tokens at least this likely, relative to the likeliest
    seed: int | None = None  # requests with the same seed draw alike, in any batch
    stop: str | list[str] | None = None  # strings that end the answer
    stop_token_ids: list[int] | None = None  # tokens that end it
    bad_words: list[str] | None = None  # strings that are never generated
    ignore_eos: bool = False  # go on after the end-of-sequence token
    max_tokens: int | None = 16  # None: as many as fit
    min_tokens: int = 0  # no end before this many tokens
    logprobs: int | None = None  # log-probabilities of this many likeliest tokens per position; -1: all
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    detokenize: bool = True  # False: token ids only, no text
    skip_special_tokens: bool = True  # leave special tokens out of the text
    spaces_between_special_tokens: bool = True  # changes nothing: a tokenizer.json's decoder puts no space there
    include_stop_str_in_output: bool = False  # keep the stop string at the end of the text
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE  # what streaming yields
    logit_bias: dict[int, float] | None = None  # token id -> what is added to its logit, -100 to 100
    allowed_token_ids: list[int] | None = None  # nothing else is sampled

    def __post_init__(self) -> None:
        # Copies, because the caller may still change its own lists, and these parameters are checked only once.
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            object.__setattr__(self, name, _as_list(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", _as_dict("logit_bias", self.logit_bias))
        if self.seed == -1:  # vLLM's spelling of "no seed"
            object.__setattr__(self, "seed", None)
        self._check_integers()
        self._check_numbers()
        self._check_lists()
        self._check_switches()
        if 0 < self.temperature < MIN_RANDOM_TEMPERATURE and not self.is_greedy:
            object.__setattr__(self, "temperature", MIN_RANDOM_TEMPERATURE)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Builds parameters from a dict. Raises ValueError for an unknown key, with the nearest known name."""
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise ValueError(f"sampling parameters must be a dict like {{'temperature': 0.0}}, got {kind}: {values!r}")
        _refuse_unknown(values)
        return cls(**values)

    def __hash__(self) -> int:  # the fields that hold lists cannot take part; equal parameters still hash alike
        return hash(tuple(value for value in vars(self).values() if not isinstance(value, (list, dict))))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def stop_strings(self) -> list[str]:
        assert not isinstance(self.stop, str)
        return self.stop or []

    def replace(self, **changes: Any) -> "SamplingParams":
        """Returns new, checked parameters with some fields changed."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def _check_integers(self) -> None:
        check_int("n", self.n, low=1)
        check_int("top_k", self.top_k, low=-1, hint="0 or -1 disable it")
        check_int("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, low=1, hint="None means as many as fit")
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if self.seed is not None:
            check_int("seed", self.seed, low=-(2**63), high=2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=-1, hint="-1 means the whole vocabulary")

    def _check_numbers(self) -> None:
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        check_number("temperature", self.temperature, 0.0, math.inf)
        check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n must be 1 with greedy sampling (temperature 0), got n={self.n}: all would be equal")
        for token_id, bias in (self.logit_bias or {}).items():
            check_int("a key of logit_bias", token_id, low=0)
            check_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            for item in getattr(self, name) or ():
                if not isinstance(item, str) or not item:
                    raise ValueError(f"{name} must hold non-empty strings, got {item!r}; None means none")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for item in getattr(self, name) or ():
                check_int(f"an item of {name}", item, low=0)
        if self.allowed_token_ids == []:
            raise ValueError("allowed_token_ids must not be empty: nothing could be sampled; use None to allow all")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need text: set detokenize=True, or stop on stop_token_ids instead")

    def _check_switches(self) -> None:
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            check_bool(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            kinds = ", ".join(map(str, RequestOutputKind))
            raise ValueError(f"output_kind must be one of {kinds}; got {self.output_kind!r}")


def _refuse_assignment(params: SamplingParams, name: str, value: Any) -> None:
    """vLLM's parameters can be changed, and its examples do that. Here the error says what to write instead."""
    raise dataclasses.FrozenInstanceError(
        f"cannot assign to {name!r}, as requests may share these parameters: "
        f"make new ones with params = params.replace({name}={value!r})"
    )


# A frozen dataclass may not define this method in its body.
SamplingParams.__setattr__ = _refuse_assignment  # type: ignore[assignment, method-assign]


def _refuse_unknown(names: Iterable[str]) -> None:
    known = [f.name for f in dataclasses.fields(SamplingParams)]
    for name in names:
        if name not in known:
            raise ValueError(unknown_name_message("sampling parameter", name, known))


def _as_list(name: str, value: Any) -> list[Any] | None:
    if value is None:
        return None
    if isinstance(value, str) and name == "stop":
        return [value]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    instead = f"; write {[value]!r}" if isinstance(value, (str, int)) else ""
    raise ValueError(f"{name} must be a list, got {type(value).__name__}: {value!r}{instead}")


def _as_dict(name: str, value: Any) -> dict[Any, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict like {{42: -100.0}}, got {type(value).__name__}: {value!r}")
    return None if value is None else dict(value)
