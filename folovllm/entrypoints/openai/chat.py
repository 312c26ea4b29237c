"""POST /v1/chat/completions: a conversation, and the model's next message.

Milestone: M8. vLLM counterpart: OpenAIServingChat (vllm/entrypoints/openai/serving_chat.py).
Left out: tool and reasoning parsers, structured output, images and audio.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from folovllm.engine.chat.messages import join_text, normalize_messages
from folovllm.entrypoints.openai.answers import (
    Chunks,
    Encode,
    Usage,
    includes_continuous_usage,
    includes_usage,
    respond,
)
from folovllm.entrypoints.openai.errors import bad_request
from folovllm.entrypoints.openai.generation import Generation, answer_id
from folovllm.entrypoints.openai.logprobs import chat_logprobs, prompt_logprobs
from folovllm.entrypoints.openai.prompts import TokenizedPrompt, chat_prompt
from folovllm.entrypoints.openai.protocol import ChatCompletionRequest
from folovllm.entrypoints.openai.refusals import check_extra_fields
from folovllm.entrypoints.openai.sampling import chat_params, check_stream_fields
from folovllm.entrypoints.openai.state import ServerState, server_state
from folovllm.outputs import CompletionOutput, RequestOutput

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answers a conversation."""
    return await create_chat_completion(server_state(request), body, request)


async def create_chat_completion(state: ServerState, body: ChatCompletionRequest, raw_request: Request) -> Response:
    """Answers one request. Raises ApiError for what is wrong with it, before anything is computed."""
    state.check_model(body.model)
    check_extra_fields(body, state.unknown_fields)
    check_stream_fields(body)
    check_messages(body.messages)
    check_tools(body)
    params = chat_params(body, state.sampling_defaults, state.engine.config.max_model_len)
    request_id = answer_id("chatcmpl", body, raw_request)

    async def start() -> tuple[ChatAnswer, Generation]:
        with state.admit(body.num_choices):
            prompt = await chat_prompt(state, body, params.max_tokens)
            answer = ChatAnswer(body, prompt, request_id, state.model_names[0])
            return answer, await Generation.start(state, body, request_id, [prompt], params)

    return await respond(state, body, raw_request, start)


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Raises ApiError (400) for content that is null. An assistant's may be: it may have called tools instead."""
    for index, message in enumerate(messages):
        if message.get("content", "") is None and message.get("role") != "assistant":
            raise bad_request(f"messages[{index}].content is null, which only an assistant's may be", "messages")


def check_tools(body: ChatCompletionRequest) -> None:
    """Raises ApiError (400) if the answer's tool calls would have to be parsed, and for tools that are no functions."""
    choice = body.tool_choice
    if body.tools == []:
        raise bad_request("tools is empty: leave it out", "tools")
    if choice is None and body.tools:
        choice = "auto"  # OpenAI's default if there are tools
    if choice not in (None, "none"):
        raise bad_request(
            f"tool_choice {choice!r} needs a parser for the model's tool calls, which this server does not have: send"
            ' "tool_choice": "none" with the tools, and read the call from the text',
            "tool_choice",
        )
    for index, tool in enumerate(body.tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
            raise bad_request(f"tools[{index}] must be like {form}", "tools")


class ChatAnswer:
    """The answer to one request, written as a whole or in chunks."""

    def __init__(self, body: ChatCompletionRequest, prompt: TokenizedPrompt, request_id: str, model: str) -> None:
        self._body, self._prompt = body, prompt
        self._shared = {"id": request_id, "object": "", "created": int(time.time()), "model": model}
        self._usage = Usage([prompt], body.num_choices)
        # Without a generation prompt the template opens no new message: the model goes on with the last one.
        self._role = "assistant" if body.add_generation_prompt is not False else body.messages[-1]["role"]
        self._echo = self._text_to_continue() if body.echo else ""

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        (output,) = outputs
        self._usage.add(0, output)
        more: dict[str, Any] = {
            "service_tier": None,
            "system_fingerprint": None,
            "usage": self._usage.total(),
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs),
        }
        if self._body.return_token_ids:
            more["prompt_token_ids"] = self._prompt.token_ids
        choices = [self._whole_choice(completion) for completion in output.outputs]
        return {**self._shared, "object": "chat.completion", "choices": choices, **more}

    async def chunks(self, outputs: AsyncIterator[tuple[int, RequestOutput]], encode: Encode) -> AsyncIterator[bytes]:
        shared = {**self._shared, "object": "chat.completion.chunk"}
        chunks = Chunks(shared, encode, includes_usage(self._body))
        continuous = includes_continuous_usage(self._body)

        def write(choice: dict[str, Any], **more: Any) -> bytes:
            usage = {"usage": self._usage.so_far(choice["index"])} if continuous else {}
            return chunks.write([choice], **usage, **more)

        is_first = True
        async for _, output in outputs:
            # The role waits for the first token, so that the time to the first chunk is the time to the first token.
            written = list(self._opening(write)) if is_first else []
            is_first = False
            self._usage.add(0, output)
            written += [write(self._delta(completion)) for completion in output.outputs]
            yield b"".join(written)
        if includes_usage(self._body):
            yield chunks.write([], usage=self._usage.total())

    def _opening(self, write: Callable[..., bytes]) -> Iterator[bytes]:
        """The first chunks of a stream: the role of each choice, and what `echo` repeats."""
        ids = {"prompt_token_ids": self._prompt.token_ids} if self._body.return_token_ids else {}
        for index in range(self._body.num_choices):
            yield write(_chunk_choice(index, {"role": self._role, "content": ""}), **ids)
        for index in range(self._body.num_choices if self._echo else 0):
            yield write(_chunk_choice(index, {"content": self._echo}))

    def _delta(self, completion: CompletionOutput) -> dict[str, Any]:
        choice = _chunk_choice(completion.index, {"content": completion.text})
        choice["logprobs"] = self._logprobs(completion)
        if completion.finish_reason is not None:
            choice["finish_reason"] = completion.finish_reason
            choice["stop_reason"] = completion.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _whole_choice(self, completion: CompletionOutput) -> dict[str, Any]:
        text = self._echo + completion.text
        choice = {
            "index": completion.index,
            "message": {"role": self._role, "content": text, "refusal": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        return {**choice, "token_ids": completion.token_ids} if self._body.return_token_ids else choice

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        num_top = self._body.top_logprobs or 0
        return chat_logprobs(completion.token_ids, completion.logprobs or [], num_top, as_ids)

    def _text_to_continue(self) -> str:
        """The text of the last message if the answer goes on with it: if both have the same role."""
        last = normalize_messages(self._body.messages)[-1]
        return join_text(last["content"] or []) if last["role"] == self._role else ""


def _chunk_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
