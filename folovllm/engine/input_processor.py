"""InputProcessor: what the user typed becomes a valid `Request`, or a ValueError that names the fix.

Milestone: M1. vLLM counterpart: vllm/v1/engine/processor.py (later input_processor.py).
Left out: multimodal inputs, LoRA, structured output, prompt embeddings.

Everything is checked here, before anything enters the engine: the engine core trusts its requests.
"""

import operator
import random
from collections.abc import Iterable
from typing import Any

from folovllm.config import EngineConfig
from folovllm.engine.tokenizer import Tokenizer
from folovllm.parts import load_part
from folovllm.request import Request
from folovllm.rope_config import RopeConfig
from folovllm.sampling_params import SamplingParams
from folovllm.utils import unknown_name_message

Prompt = str | list[int] | dict[str, Any]

_PROMPT_KEYS = ["prompt", "prompt_token_ids", "cache_salt"]


class InputProcessor:
    """Validates and tokenises prompts, and resolves the defaults of their SamplingParams.

    `eos_token_id`, the tokenizer's, stops a request silently. `extra_eos_token_ids`, those that only config.json and
    generation_config.json name, are stop token ids and show up as `stop_reason`. `max_logprobs` -1 allows the whole
    vocabulary. `vocab_size` is the model's. `rope` says which angles a request needs for the length it may reach.
    `request_class` is the part core.request.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        max_logprobs: int = 20,
        eos_token_id: int | None = None,
        extra_eos_token_ids: tuple[int, ...] = (),
        seed: int = 0,
        rope: RopeConfig | None = None,
        request_class: type[Request] = Request,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_logprobs = vocab_size if max_logprobs == -1 else max_logprobs
        self.eos_token_id = eos_token_id
        self.extra_eos_token_ids = tuple(i for i in extra_eos_token_ids if i != eos_token_id)
        self.rope = rope or RopeConfig()
        self._request_class = request_class
        self._seeds = random.Random(seed)
        self._last_bad_words: tuple[list[str], list[list[int]]] = ([], [])  # and their spellings

    @classmethod
    def from_config(cls, config: EngineConfig, tokenizer: Tokenizer | None) -> "InputProcessor":
        """The input processor of an engine with this resolved config."""
        arch = config.model_config.arch
        eos_token_id = None if tokenizer is None else tokenizer.eos_token_id
        if eos_token_id is not None and eos_token_id >= arch.vocab_size:
            eos_token_id = None  # added to the tokenizer alone: the model can never sample it
        return cls(
            tokenizer,
            vocab_size=arch.vocab_size,
            max_model_len=config.max_model_len,
            max_logprobs=config.model_config.max_logprobs,
            eos_token_id=eos_token_id,
            extra_eos_token_ids=tuple(i for i in arch.eos_token_ids if i < arch.vocab_size),
            seed=config.model_config.seed,
            rope=arch.rope,
            request_class=load_part("core.request", config.parts),
        )

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> Request:
        """Return a Request (its `n` still to be fanned out by ParentRequest) or raise ValueError, changing nothing."""
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id must be a non-empty string, got {request_id!r}")
        check_sampling_params(params)
        if arrival_time is not None and not isinstance(arrival_time, (int, float)):
            raise ValueError(f"arrival_time must be seconds of time.monotonic(), got {arrival_time!r}")
        if not isinstance(priority, int):
            raise ValueError(f"priority must be an integer (lower is served first), got {priority!r}")
        token_ids = self._tokenize(prompt)
        self._check_length(len(token_ids))
        self.check_vocabulary("the prompt", token_ids)
        params = self._resolve(params, len(token_ids))
        return self._request_class(
            request_id,
            token_ids,
            params,
            eos_token_id=self.eos_token_id,
            arrival_time=arrival_time,
            priority=priority,
            cache_salt=_cache_salt(prompt),
            bad_words_token_ids=self._tokenize_bad_words(params.bad_words or []),
            extra_eos_token_ids=self.extra_eos_token_ids,
            position_offset=self._position_offset(len(token_ids), params),
            # Last, so that a refused request draws nothing: the seeds of the others must not depend on it.
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
        )

    @staticmethod
    def prompt_text(prompt: Prompt) -> str | None:
        """The prompt as text where the user gave text; for `RequestOutput.prompt`."""
        return prompt.get("prompt") if isinstance(prompt, dict) else prompt if isinstance(prompt, str) else None

    def _tokenize(self, prompt: Any) -> list[int]:
        if isinstance(prompt, dict):
            prompt = _content_of_dict(prompt)
        if not isinstance(prompt, str):
            return _check_token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer: pass {'prompt_token_ids': [...]} instead of text")
        self.check_text(prompt)
        return self.tokenizer.encode(prompt)

    @property
    def max_characters(self) -> int:
        """The length of the longest text that can fit: no token is longer than the longest one of the vocabulary."""
        assert self.tokenizer is not None
        return self.max_model_len * self.tokenizer.max_chars_per_token

    def may_fit(self, num_characters: int) -> bool:
        """Whether a text of this length can fit, however it is tokenised.

        A short text is decided without a look at the whole vocabulary, which takes 36 ms for 49,152 tokens.
        """
        return self.tokenizer is None or num_characters <= self.max_model_len or num_characters <= self.max_characters

    def check_text(self, text: str) -> None:
        """Raises ValueError for a text with more characters than any prompt that fits, without tokenising it."""
        if not self.may_fit(len(text)):
            raise ValueError(
                f"the prompt of {len(text)} characters is longer than the maximum model length of {self.max_model_len} "
                f"tokens, which are at most {self.max_characters} characters: shorten it, or raise max_model_len if "
                "the model allows"
            )

    def _check_length(self, prompt_len: int) -> None:
        if prompt_len == 0:
            raise ValueError("the prompt cannot be empty: it needs at least one token")
        limit = self.max_model_len
        if prompt_len > limit:
            raise ValueError(
                f"the prompt (length {prompt_len}) is longer than the maximum model length of {limit}: "
                "shorten it, or raise max_model_len if the model allows"
            )
        if prompt_len == limit:
            raise ValueError(
                f"the prompt (length {prompt_len}) plus the number of requested output tokens (at least 1) is longer "
                f"than the maximum model length of {limit}: shorten it, or raise max_model_len if the model allows"
            )

    def check_vocabulary(self, what: str, token_ids: Iterable[int]) -> None:
        """Raises ValueError if the model does not have one of these tokens."""
        token_ids = list(token_ids)
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return
        bad = [i for i in token_ids if not 0 <= i < self.vocab_size]
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(f"{what}: token id {shown} is out of vocabulary (valid ids are 0 to {self.vocab_size - 1})")

    def _resolve(self, params: SamplingParams, prompt_len: int) -> SamplingParams:
        """The same parameters with everything that depends on model and prompt filled in."""
        if self.tokenizer is None and params.stop:
            raise ValueError("stop strings need a tokenizer and this engine has none: use stop_token_ids")
        self.check_vocabulary("stop_token_ids", params.stop_token_ids or ())
        self.check_vocabulary("allowed_token_ids", params.allowed_token_ids or ())
        self.check_vocabulary("logit_bias", params.logit_bias or ())
        return params.replace(
            max_tokens=self._max_tokens(params, prompt_len),
            logprobs=self._num_logprobs("logprobs", params.logprobs),
            prompt_logprobs=self._num_logprobs("prompt_logprobs", params.prompt_logprobs),
            stop_token_ids=self._stop_token_ids(params),
        )

    def _max_tokens(self, params: SamplingParams, prompt_len: int) -> int:
        if params.max_tokens is not None:
            return params.max_tokens  # more than fit is allowed: the request then ends with finish_reason "length"
        room = self.max_model_len - prompt_len
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens ({params.min_tokens}) exceeds the {room} tokens that fit after this prompt "
                f"(max_model_len {self.max_model_len}): lower it, shorten the prompt, or raise max_model_len"
            )
        return room

    def _num_logprobs(self, name: str, count: int | None) -> int | None:
        wanted = self.vocab_size if count == -1 else count
        if wanted is not None and wanted > self.max_logprobs:
            asked = f"-1 (the whole vocabulary, {wanted})" if count == -1 else wanted
            raise ValueError(
                f"{name}: {asked} is greater than the maximum allowed, {self.max_logprobs}: ask for fewer, or start "
                "the engine with a larger max_logprobs (-1 for no limit)"
            )
        return wanted

    def _stop_token_ids(self, params: SamplingParams) -> list[int] | None:
        if params.ignore_eos:
            return params.stop_token_ids
        return sorted({*(params.stop_token_ids or ()), *self.extra_eos_token_ids}) or params.stop_token_ids

    def _position_offset(self, prompt_len: int, params: SamplingParams) -> int:
        assert params.max_tokens is not None, "_resolve() first"
        longest = min(prompt_len + params.max_tokens, self.max_model_len)
        return self.rope.position_offset(longest, self.max_model_len)

    def _tokenize_bad_words(self, bad_words: list[str]) -> list[list[int]]:
        """Token ids of each word, as spelled at the start of a text and after a space; these are different tokens.

        vLLM drops the second form when its length differs from the first; then the word slips through after a space.
        """
        if bad_words and self.tokenizer is None:
            raise ValueError("bad_words need a tokenizer and this engine has none: use logit_bias on token ids")
        if bad_words != self._last_bad_words[0]:  # the prompts of one HTTP request all have the same
            spellings = {tuple(ids): ids for word in bad_words for ids in self._spellings(word)}
            self._last_bad_words = (list(bad_words), list(spellings.values()))
        return self._last_bad_words[1]

    def _spellings(self, word: str) -> list[list[int]]:
        assert self.tokenizer is not None
        bare = word.lstrip()
        texts = [bare, " " + bare] if bare else [word]  # spaces alone are banned as they stand
        spellings = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if not all(spellings):
            raise ValueError(f"bad_words: {word!r} has no tokens in this vocabulary: remove it")
        for token_ids in spellings:
            self.check_vocabulary(f"bad_words: {word!r}", token_ids)
        return spellings


def check_sampling_params(params: object) -> None:
    """ValueError for anything but a SamplingParams (a dict, say: SamplingParams.from_dict makes one of it)."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling_params must be a SamplingParams, got {type(params).__name__}: {params!r}")


def _content_of_dict(prompt: dict[str, Any]) -> Any:
    """Token ids if the dict has them, else the text."""
    for key in prompt:
        if key not in _PROMPT_KEYS:
            raise ValueError(unknown_name_message("prompt key", str(key), _PROMPT_KEYS))
    if prompt.get("prompt_token_ids") is not None:
        return prompt["prompt_token_ids"]
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise ValueError(
            "a prompt given as a dict needs 'prompt' (a string) or 'prompt_token_ids' (a list of integers), "
            f"got {prompt!r}"
        )
    return text


def _check_token_ids(prompt: Any) -> list[int]:
    """A fresh list of plain ints (numpy's are converted), or ValueError."""
    if not isinstance(prompt, (list, tuple)):
        raise ValueError(
            "a prompt must be a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids', "
            f"got {type(prompt).__name__}: {prompt!r}"
        )
    if set(map(type, prompt)) <= {int}:  # the usual case, without a Python loop
        return list(prompt)
    try:
        if any(isinstance(item, bool) for item in prompt):
            raise TypeError("bool is not a token id")
        return [operator.index(item) for item in prompt]
    except TypeError:
        wrong = next(i for i in prompt if isinstance(i, bool) or not hasattr(i, "__index__"))
        raise ValueError(
            f"token ids must be integers, got {wrong!r} ({type(wrong).__name__}); one call takes one prompt"
        ) from None


def _cache_salt(prompt: Any) -> str | None:
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt must be a non-empty string, got {salt!r}")
    return salt
