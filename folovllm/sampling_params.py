"""SamplingParams: how the next token of a request is chosen and when the request stops.

Milestone: M0. vLLM counterpart: vllm/sampling_params.py (field names, defaults and ranges are vLLM's).
Left out: beam search, structured output, logits processors (milestones after M7).

Row 0: plain data, no torch.
"""

import dataclasses
import difflib
import enum
import math
from dataclasses import dataclass
from typing import Any

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy
MIN_RANDOM_TEMPERATURE = 1e-2  # dividing by less overflows; vLLM raises smaller ones to this as well


class RequestOutputKind(enum.Enum):
    """What a RequestOutput holds while a request streams."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last output
    FINAL_ONLY = 2  # nothing until the request has finished


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; every field has vLLM's name, default and range.

    Raises ValueError for a value out of range; the message names the field, the value and the range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 both mean "all tokens"
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            object.__setattr__(self, name, _as_list(name, getattr(self, name)))
        if self.seed == -1:  # vLLM's spelling of "no seed"
            object.__setattr__(self, "seed", None)
        self._check_integers()
        self._check_numbers()
        self._check_lists()
        if 0 < self.temperature < MIN_RANDOM_TEMPERATURE and not self.is_greedy:
            object.__setattr__(self, "temperature", MIN_RANDOM_TEMPERATURE)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SamplingParams":
        """Build from a dict, refusing unknown keys with the nearest known name."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(unknown_name_message("sampling parameter", key, known))
        return cls(**values)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def stop_strings(self) -> list[str]:
        assert not isinstance(self.stop, str)
        return self.stop or []

    def replace(self, **changes: Any) -> "SamplingParams":
        return dataclasses.replace(self, **changes)

    def _check_integers(self) -> None:
        _check_int("n", self.n, low=1)
        _check_int("top_k", self.top_k, low=-1, hint="0 or -1 disable it")
        _check_int("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=1, hint="None means as many as fit")
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if self.seed is not None:
            _check_int("seed", self.seed, low=-(2**63), high=2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), low=-1, hint="-1 means the whole vocabulary")
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n must be 1 with greedy sampling (temperature 0), got n={self.n}: all would be equal")

    def _check_numbers(self) -> None:
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        for token_id, bias in (self.logit_bias or {}).items():
            _check_int("a key of logit_bias", token_id, low=0)
            _check_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            for item in getattr(self, name) or ():
                if not isinstance(item, str) or not item:
                    raise ValueError(f"{name} must hold non-empty strings, got {item!r}")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for item in getattr(self, name) or ():
                _check_int(f"an item of {name}", item, low=0)
        if self.allowed_token_ids == []:
            raise ValueError("allowed_token_ids must not be empty: nothing could be sampled; use None to allow all")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need text: set detokenize=True, or stop on stop_token_ids instead")


def unknown_name_message(kind: str, name: str, known: list[str]) -> str:
    """One line that refuses `name` and suggests the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def _as_list(name: str, value: Any) -> list[Any] | None:
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str) and name == "stop":
        return [value]
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    raise ValueError(f"{name} must be a list, got {type(value).__name__}: {value!r}")


def _check_int(name: str, value: Any, low: int, high: int | None = None, hint: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}" + (f" ({hint})" if hint else ""))


def _check_number(name: str, value: Any, low: float, high: float, low_open: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or math.isinf(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value < low or value > high or (low_open and value == low):
        raise ValueError(f"{name} must be in {'(' if low_open else '['}{low:g}, {high:g}], got {value}")
