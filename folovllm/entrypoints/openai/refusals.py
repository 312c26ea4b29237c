"""Fields that this server does not have: each is refused with an alternative, or named in the log.

Milestone: M8. vLLM counterpart: the `model_validator`s of vllm/entrypoints/openai/protocol.py, and OpenAIBaseModel,
which logs unknown fields at every request.

The rule: a field that would change the answer is never dropped silently. Clients send many fields at a value that
means "off", such as `"best_of": 1`; that is no reason to refuse a request.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from folovllm.entrypoints.openai.errors import bad_request
from folovllm.entrypoints.openai.protocol import ApiModel, GenerationRequest

logger = logging.getLogger(__name__)

MAX_LOGGED_FIELDS = 1000  # a client may invent names without end


class Refusal(NamedTuple):
    """What a client can do instead, and the values of the field that ask for nothing (null always does)."""

    instead: str
    off: tuple[Any, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raises ApiError (400) unless `value` asks for nothing."""
        if value is not None and value not in self.off:
            raise bad_request(f"{name} is not supported: {self.instead}", name)


_NO_STRUCTURE = Refusal(
    "the output cannot be constrained; describe the format in the prompt, and check the answer in the client", ({}, "")
)
_NO_CALLS = Refusal('send the functions as "tools" with "tool_choice": "none", and read the call from the text')
_TEXT_ONLY = "this server takes and gives text only"

REFUSALS = {
    "response_format": Refusal(
        'only {"type": "text"} is supported; describe the format in the prompt, and check the answer in the client',
        ({"type": "text"},),
    ),
    "structured_outputs": _NO_STRUCTURE,
    "guided_json": _NO_STRUCTURE,
    "guided_regex": _NO_STRUCTURE,
    "guided_choice": _NO_STRUCTURE,
    "guided_grammar": _NO_STRUCTURE,
    "guided_decoding_backend": _NO_STRUCTURE,
    "guided_whitespace_pattern": _NO_STRUCTURE,
    "structural_tag": _NO_STRUCTURE,
    "best_of": Refusal('the server does not rank answers; send "n" with "logprobs", and choose in the client'),
    "use_beam_search": Refusal('use "temperature": 0 for the greedy answer, or "n" for several', (False,)),
    "suffix": Refusal("text cannot be inserted in the middle; put all that the model should read in the prompt", ("",)),
    "logits_processors": Refusal('use "logit_bias", "allowed_token_ids" or "bad_words"', ([],)),
    "kv_transfer_params": Refusal("the KV cache is not shared between servers; leave it out", ({},)),
    "vllm_xargs": Refusal("this server has no extensions that read it; leave it out", ({},)),
    "prompt_embeds": Refusal('send "prompt" as text or as token ids', ([], "")),
    "mm_processor_kwargs": Refusal(f"{_TEXT_ONLY}; leave it out", ({},)),
    "audio": Refusal(f"{_TEXT_ONLY}; leave it out"),
    "modalities": Refusal(f'{_TEXT_ONLY}; leave it out, or send ["text"]', (["text"], [])),
    "functions": _NO_CALLS,
    "function_call": Refusal(_NO_CALLS.instead, ("none",)),
    "web_search_options": Refusal('the server cannot search; put the text to read in the prompt or in "documents"'),
    "chat_template": Refusal("a template is a program; the server's owner chooses one with serve --chat-template"),
}


def check_extra_fields(body: ApiModel, logged: set[str]) -> None:
    """Raises ApiError (400) for a field that asks for what the server cannot do, and for a number that is not finite.

    The log names every other field that has no effect once: `logged` holds the names that it has had.
    """
    extra = body.model_extra or {}
    num_choices = body.num_choices if isinstance(body, GenerationRequest) else 1
    for name, refusal in REFUSALS.items():
        if name != "best_of" or extra.get(name) != num_choices:  # ranking n answers of n changes nothing
            refusal.check(name, extra.get(name))
    _check_finite(body)
    _log_once([name for name in extra if name not in REFUSALS], logged)


def _check_finite(body: ApiModel) -> None:
    """Checks the numbers in the fields that have no type: pydantic has checked the others."""
    for name, value in [*vars(body).items(), *(body.model_extra or {}).items()]:
        if name != "prompt" and isinstance(value, (float, list, dict)) and not _is_finite(value):
            raise bad_request(f"{name} holds NaN or an infinity: every number must be finite", name)


def _is_finite(value: Any) -> bool:
    """Whether all numbers in JSON data are finite. It may be nested more deeply than Python's stack reaches.

    The types of a list's items are collected without a Python loop: a list may have millions, and streams wait.
    """
    todo = [[value]]
    while todo:
        items = todo.pop()
        kinds = set(map(type, items))
        if float in kinds and not all(math.isfinite(item) for item in items if type(item) is float):
            return False
        if dict in kinds:
            todo.extend(list(item.values()) for item in items if type(item) is dict)
        if list in kinds:
            todo.extend(item for item in items if type(item) is list)
    return True


def _log_once(names: Iterable[str], logged: set[str]) -> None:
    new = [name for name in names if name not in logged][: MAX_LOGGED_FIELDS - len(logged)]
    if new:
        logged.update(new)
        shown = ", ".join(repr(name[:80]) for name in new)
        logger.warning("fields that have no effect here, and are named once: %s", shown)
