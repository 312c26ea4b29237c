"""The bodies of /v1/completions and /v1/chat/completions: every field that changes an answer, with its type.

Milestone: M8. vLLM counterpart: CompletionRequest and ChatCompletionRequest (vllm/entrypoints/openai/protocol.py).
Left out: what this engine does not have; `refusals` answers for each of those fields.

Only types are checked here. Ranges are checked by SamplingParams and by the engine, once and in one place, so that a
bad value gets the same message over HTTP as in Python. A null field counts as a missing one. pydantic converts what
means the same ("5" to 5). A field that is not listed is kept in `model_extra`.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]  # JSON has no limit; messages to the engine do
Prompts = list[str] | list[list[int]]
_PROMPT_FORMS = "a text, a list of texts, a list of token ids, or a list of lists of token ids"


class ApiModel(BaseModel):
    """A body, or a part of one. NaN and infinities are refused, as JSON does not have them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class StreamOptions(ApiModel):
    """What a stream tells beside the text."""

    include_usage: bool | None = False  # a last chunk with the numbers of tokens
    continuous_usage_stats: bool | None = False  # and the numbers so far in every chunk


class GenerationRequest(ApiModel):
    """The fields that both APIs have. Those that SamplingParams has too mean what they mean there."""

    model: str | None = None  # None or "": the model that is served
    n: Int | None = None
    temperature: float | None = None  # None, here and below: generation_config.json decides, then SamplingParams
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token ids, as JSON's keys are strings
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    max_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    echo: bool | None = False  # begin the answer with the prompt; in a chat, with the text that is continued
    truncate_prompt_tokens: Int | None = None  # keep this many tokens at the end of the prompt; -1: as many as fit
    add_special_tokens: bool | None = None  # when the prompt is tokenised; None: True, but False for a chat
    return_token_ids: bool | None = False  # the ids of prompt and answer beside the texts
    return_tokens_as_token_ids: bool | None = False  # "token_id:42" instead of the token's text in logprobs
    priority: Int | None = 0  # lower is served first
    cache_salt: str | None = None  # only requests with the same salt share cached prefixes
    request_id: str | None = None  # becomes part of the answer's id

    @property
    def num_choices(self) -> int:
        """The number of answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def num_completions(self) -> int:
        """The number of answers to all prompts."""
        return self.num_choices


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Prompts
    logprobs: Int | None = None  # this many likeliest tokens at each position, and the token itself

    @field_validator("prompt", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    @classmethod
    def _as_list(cls, prompt: Any) -> Prompts:
        """All forms of a prompt as a list of prompts. E.g. "Hi" -> ["Hi"] and [5, 6] -> [[5, 6]].

        pydantic would try each form in turn, and its message would list what is wrong with each.
        """
        prompts = [prompt] if isinstance(prompt, str) or _is_token_ids(prompt) else prompt
        if not isinstance(prompts, list) or not (all(map(_is_text, prompts)) or all(map(_is_token_ids, prompts))):
            raise ValueError(f"must be {_PROMPT_FORMS}; no list may be empty, and the forms cannot be mixed")
        if not prompts:
            raise ValueError(f"is an empty list; it must be {_PROMPT_FORMS}")
        return prompts

    @property
    def num_completions(self) -> int:
        return len(self.prompt) * self.num_choices


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = False
    top_logprobs: Int | None = None  # this many likeliest tokens at each position; needs `logprobs`
    max_completion_tokens: Int | None = None  # OpenAI's newer name of max_tokens; this one wins
    tools: list[dict[str, Any]] | None = None  # given to the chat template
    tool_choice: str | dict[str, Any] | None = None  # only "none": nothing here parses the calls of an answer
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    documents: list[dict[str, Any]] | None = None  # given to the chat template
    chat_template_kwargs: dict[str, Any] | None = None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token_ids(value: Any) -> bool:
    """Whether `value` is a non-empty list of integers. The set of types is built without a Python loop."""
    return isinstance(value, list) and set(map(type, value)) == {int}
