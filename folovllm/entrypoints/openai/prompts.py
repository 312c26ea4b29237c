"""From the prompt of a request to token ids that fit the model.

Milestone: M8. vLLM counterpart: CompletionRenderer (vllm/entrypoints/renderer.py) and `_preprocess_chat`
(vllm/entrypoints/openai/serving_engine.py). Left out: prompt embeddings.

A text is refused by its length in characters before it is tokenised: tokenising 20 MB takes seconds, and no token is
longer than the longest entry of the vocabulary.
"""

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

from folovllm.engine.input_processor import InputProcessor
from folovllm.entrypoints.openai.errors import ApiError, bad_request, refusing
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from folovllm.entrypoints.openai.sampling import as_bad_request
from folovllm.entrypoints.openai.state import ServerState

MAX_CHARACTERS = 4_000_000  # of a text that is truncated or only tokenised: 30 MB take many seconds and much memory
MAX_COMPLETIONS = 1024  # in one request: prompts x n


class TokenizedPrompt(NamedTuple):
    """A prompt that fits. `text` is None if the client gave ids and does not read the text."""

    text: str | None
    token_ids: list[int]

    def for_engine(self, cache_salt: str | None) -> dict[str, Any]:
        # Without the text: its length has been checked, and it may be much longer than a truncated prompt.
        return {"prompt_token_ids": self.token_ids, "cache_salt": cache_salt}


async def completion_prompts(
    state: ServerState, body: CompletionRequest, max_tokens: int | None
) -> list[TokenizedPrompt]:
    """The prompts of a completion, in order. Raises ApiError (400) for one that does not fit."""
    check_count(body, len(body.prompt))
    limit = Limit.of(state, body, "prompt", max_tokens)
    prompts = []
    for prompt in body.prompt:
        await asyncio.sleep(0)  # other streams have their turn between two prompts
        if isinstance(prompt, str):
            limit.check_characters(len(prompt))
            token_ids = await _encode(state, body, prompt, body.add_special_tokens is not False)
            prompts.append(TokenizedPrompt(prompt, limit.fit(token_ids)))
        else:
            token_ids = limit.fit(prompt)
            prompts.append(TokenizedPrompt(_decode(state, token_ids) if body.echo else None, token_ids))
    return prompts


async def chat_prompt(state: ServerState, body: ChatCompletionRequest, max_tokens: int | None) -> TokenizedPrompt:
    """The conversation as the chat template renders it. Raises ApiError (400) for bad messages."""
    _check_template(state)
    check_count(body, 1)
    limit = Limit.of(state, body, "messages", max_tokens)
    limit.check_characters(sum(map(len, _texts(body.messages))))
    limit.check_entries(body.messages)
    try:
        rendered = await state.engine.render_chat(
            body.messages,
            state.chat_template,
            body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            tools=body.tools,
            documents=body.documents,
            chat_template_kwargs=body.chat_template_kwargs,
        )
    except ValueError as error:
        raise as_bad_request(error, body, "messages") from None
    text, token_ids = rendered["prompt"], rendered["prompt_token_ids"]
    if body.add_special_tokens:  # in addition to those of the template
        token_ids = await _encode(state, body, text, True)
    return TokenizedPrompt(text, limit.fit(token_ids))


def check_count(body: GenerationRequest, num_prompts: int) -> None:
    """Raises ApiError (400) for a request that asks for too many completions."""
    if num_prompts > MAX_COMPLETIONS:
        raise bad_request(f"prompt holds {num_prompts} prompts: one request may hold {MAX_COMPLETIONS}", "prompt")
    if num_prompts * body.num_choices > MAX_COMPLETIONS:
        raise bad_request(
            f"n ({body.num_choices}) times the number of prompts ({num_prompts}) exceeds {MAX_COMPLETIONS}: spread"
            " the prompts over several requests",
            "n",
        )


class Limit(NamedTuple):
    """How long the prompts of a request may be, and the field that holds them."""

    field: str
    input_processor: InputProcessor
    keep: int | None  # truncate_prompt_tokens, resolved: the prompt's last tokens

    @classmethod
    def of(cls, state: ServerState, body: GenerationRequest, field: str, max_tokens: int | None) -> "Limit":
        max_model_len, keep = state.engine.config.max_model_len, body.truncate_prompt_tokens
        if keep is not None and not (keep == -1 or 1 <= keep <= max_model_len):
            raise bad_request(
                f"truncate_prompt_tokens must be -1 (as many as fit) or between 1 and {max_model_len}, got {keep}",
                "truncate_prompt_tokens",
            )
        if keep == -1:
            keep = max_model_len - min(max_tokens or 1, max_model_len - 1)
        return cls(field, state.engine.input_processor, keep)

    @property
    def max_model_len(self) -> int:
        return self.input_processor.max_model_len

    def check_characters(self, count: int) -> None:
        """Raises ApiError (400) if a text of `count` characters has too many tokens, however it is tokenised."""
        if self.keep is None and not self.input_processor.may_fit(count):
            most = self.input_processor.max_characters
            raise self._too_long(f"has {count} characters, and {self.max_model_len} tokens hold at most {most}")
        if count > MAX_CHARACTERS and not self.input_processor.may_fit(count):
            raise self._too_long(f"has {count} characters, and at most {MAX_CHARACTERS} may be truncated")

    def check_entries(self, messages: list[dict[str, Any]]) -> None:
        """Raises ApiError (400) for a conversation that takes long to render, though its texts may be empty."""
        count = sum(map(_num_entries, messages))
        if count > self.max_model_len:
            raise self._too_long(f"has {count} messages, parts of messages and tool calls, more than its tokens")

    def fit(self, token_ids: list[int]) -> list[int]:
        """The token ids, truncated if the request says so. Raises ApiError (400) if there is no room for an answer."""
        if self.keep is not None:
            token_ids = token_ids[-self.keep :]
        if len(token_ids) >= self.max_model_len:
            raise self._too_long(f"has {len(token_ids)} tokens, and the answer needs at least 1")
        return token_ids

    def _too_long(self, what: str) -> ApiError:
        """OpenAI's code for it, and its words: several client libraries look for either."""
        or_else = ', or send "truncate_prompt_tokens": -1 to keep its end' if self.keep is None else ""
        words = f"This model's maximum context length is {self.max_model_len} tokens. The prompt {what}: shorten it"
        return bad_request(f"{words}{or_else}.", self.field, "context_length_exceeded")


def _check_template(state: ServerState) -> None:
    tokenizer = state.engine.tokenizer
    if tokenizer is None:
        raise bad_request("this server has no tokenizer: send token ids to /v1/completions", "messages")
    if state.chat_template is None and not tokenizer.chat_templates:
        raise bad_request(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template", "messages"
        )


async def _encode(state: ServerState, body: GenerationRequest, text: str, add_special_tokens: bool) -> list[int]:
    try:
        return await state.engine.encode(text, add_special_tokens)
    except ValueError as error:  # half of a surrogate pair, or a server without a tokenizer
        raise as_bad_request(error, body, "prompt") from None


def _decode(state: ServerState, token_ids: list[int]) -> str:
    """The text of a prompt that was given as ids, for `echo`."""
    if state.engine.tokenizer is None:
        message = 'echo needs the text of the prompt, and this server has no tokenizer: send "echo": false'
        raise bad_request(message, "echo")
    with refusing("prompt"):
        state.engine.input_processor.check_vocabulary("the prompt", token_ids)
    return state.engine.tokenizer.decode(token_ids, skip_special_tokens=False)


def _num_entries(message: dict[str, Any]) -> int:
    """A message, its parts and its tool calls."""
    return 1 + sum(len(value) for value in (message.get("content"), message.get("tool_calls")) if type(value) is list)


def _texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of a conversation, as far as they have their usual form."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text
