"""From the fields of a request to its SamplingParams, and from a ValueError back to the field that it is about.

Milestone: M8. vLLM counterpart: `to_sampling_params` of both requests (vllm/entrypoints/openai/protocol.py),
get_max_tokens (vllm/entrypoints/utils.py), and the validators of both requests.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from folovllm.entrypoints.openai.errors import ApiError, bad_request
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from folovllm.sampling_params import RequestOutputKind, SamplingParams

COMPLETION_TOKENS = 16  # what /v1/completions gives if a request does not say; a chat fills the context
MAX_STOPS = 4
MAX_CHARACTERS = 10_000  # of all texts in `stop`, of those in `bad_words`, and of `cache_salt`
MAX_BAD_WORDS = 1000  # each is tokenised twice
MAX_TOKEN_IDS = 2**18  # in `logit_bias`, `allowed_token_ids` and `stop_token_ids`, times the completions
MAX_LOGIT_BIAS = 100.0  # beyond it a bias counts as this much, as in vLLM
_DECIDED_BY_API = ("max_tokens", "prompt_logprobs", "logit_bias")
_SAME = [  # the other fields that a body and SamplingParams have in common
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name in GenerationRequest.model_fields and field.name not in _DECIDED_BY_API
]


def completion_params(body: CompletionRequest, defaults: Mapping[str, Any], max_model_len: int) -> SamplingParams:
    """The SamplingParams of a completion. `defaults` are those of the model's generation_config.json."""
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = min(COMPLETION_TOKENS, defaults.get("max_tokens", COMPLETION_TOKENS))
    if max_tokens == 0 and body.echo:
        max_tokens = 1  # the engine makes a token in every step; the answer leaves it out
    # With `echo`, `logprobs` also asks for those of the prompt.
    for_prompt = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    own = {"max_tokens": max_tokens, "logprobs": body.logprobs, "prompt_logprobs": for_prompt}
    return _params(body, defaults, own, max_model_len)


def chat_params(body: ChatCompletionRequest, defaults: Mapping[str, Any], max_model_len: int) -> SamplingParams:
    """The SamplingParams of a chat. Without a limit the answer may fill the context."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is None:
        max_tokens = defaults.get("max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise bad_request('top_logprobs needs "logprobs": true', "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    own = {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": body.prompt_logprobs}
    if body.echo and body.prompt_logprobs is None and not body.stream:  # a stream has no place for them
        own["prompt_logprobs"] = logprobs
    return _params(body, defaults, own, max_model_len)


def check_stream_fields(body: GenerationRequest) -> None:
    """Raises ApiError (400) for fields that contradict `stream`."""
    if body.stream_options is not None and not body.stream:
        raise bad_request('stream_options needs "stream": true', "stream_options")
    if body.stream and body.prompt_logprobs:
        message = 'prompt_logprobs cannot be streamed: send "stream": false, or "echo" with "logprobs"'
        raise bad_request(message, "prompt_logprobs")


def as_bad_request(error: ValueError, body: GenerationRequest, otherwise: str | None = None) -> ApiError:
    """The answer to a ValueError of SamplingParams, the engine or the chat template, with the field it names, or else
    the field `otherwise`.

    E.g. "temperature must be in [0, inf), got -1" -> param "temperature"; "messages[2] needs ..." -> "messages".
    """
    names = sorted({*type(body).model_fields, "prompt"} - {"model"}, key=len, reverse=True)
    message = str(error)
    found = re.search(rf"\b({'|'.join(names)})\b", message)
    name = found[1] if found else otherwise
    if isinstance(body, ChatCompletionRequest) and name == "prompt":
        name = "messages"
    if isinstance(body, ChatCompletionRequest) and name == "logprobs":  # SamplingParams calls it so
        name, message = "top_logprobs", message.replace("logprobs", "top_logprobs", 1)
    return bad_request(message, name)


def _params(
    body: GenerationRequest, defaults: Mapping[str, Any], own: dict[str, Any], max_model_len: int
) -> SamplingParams:
    """`defaults`, then the fields of the request, then what its API decides (`own`)."""
    _check_max_tokens(body, own["max_tokens"], max_model_len)
    if isinstance(body.stop, list) and len(body.stop) > MAX_STOPS:
        raise bad_request(f"stop holds {len(body.stop)} texts: {MAX_STOPS} are allowed", "stop")
    _check_sizes(body)
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    values = {**defaults, **given, **own, "logit_bias": _logit_bias(body.logit_bias), "output_kind": kind}
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise as_bad_request(error, body) from None


def _check_sizes(body: GenerationRequest) -> None:
    """Raises ApiError (400) for a field that is too large.

    Each of the completions that a request asks for has a copy on its way to the engine. And the event loop checks the
    fields, so that all streams wait meanwhile.
    """
    texts = {"stop": [body.stop] if isinstance(body.stop, str) else body.stop, "bad_words": body.bad_words}
    for name, values in [*texts.items(), ("cache_salt", [body.cache_salt or ""])]:
        if (count := sum(map(len, values or ()))) > MAX_CHARACTERS:
            raise bad_request(f"{name} holds {count} characters: {MAX_CHARACTERS} are allowed", name)
    if len(body.bad_words or ()) > MAX_BAD_WORDS:
        raise bad_request(
            f"bad_words holds {len(body.bad_words or ())} words: {MAX_BAD_WORDS} are allowed", "bad_words"
        )
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        if (count := len(getattr(body, name) or ()) * body.num_completions) > MAX_TOKEN_IDS:
            raise bad_request(
                f"{name} holds {count} token ids, counted for each completion: {MAX_TOKEN_IDS} are allowed; list fewer,"
                " or spread the prompts over several requests",
                name,
            )


def _check_max_tokens(body: GenerationRequest, max_tokens: int | None, max_model_len: int) -> None:
    if max_tokens is None or 0 < max_tokens <= max_model_len:
        return  # prompt and answer together may be too long: the answer then ends with finish_reason "length"
    name = "max_tokens" if getattr(body, "max_completion_tokens", None) is None else "max_completion_tokens"
    if max_tokens <= 0:
        raise bad_request(f"{name} must be at least 1, got {max_tokens}", name)
    raise bad_request(
        f"{name} ({max_tokens}) exceeds the model's context of {max_model_len} tokens, which holds the prompt and the"
        " answer: ask for fewer",
        name,
    )


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    """E.g. {"42": -100} -> {42: -100.0}."""
    if given is None:
        return None
    wrong = next((key for key in given if not re.fullmatch("[0-9]{1,18}", key)), None)
    if wrong is not None:
        raise bad_request(f'logit_bias: a key must be a token id such as "42", got {wrong[:80]!r}', "logit_bias")
    return {int(key): max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, bias)) for key, bias in given.items()}
