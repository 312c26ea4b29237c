"""POST /v1/responses: OpenAI's newer API, for plain text.

Milestone: M8. vLLM counterpart: OpenAIServingResponses (vllm/entrypoints/openai/serving_responses.py). Left out: tools,
reasoning items, stored responses and background mode. Each is refused by its name.

A request becomes a conversation and is then a chat like any other. Only the words of the answer differ.
"""

import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

from folovllm.entrypoints.openai.answers import Encode, GenerationStream, Usage, dumps, json_answer
from folovllm.entrypoints.openai.errors import ApiError, as_api_error, bad_request, error_body
from folovllm.entrypoints.openai.generation import Generation, unless_client_leaves
from folovllm.entrypoints.openai.prompts import TokenizedPrompt, chat_prompt
from folovllm.entrypoints.openai.protocol import ApiModel, ChatCompletionRequest, Int
from folovllm.entrypoints.openai.refusals import Refusal, check_extra_fields
from folovllm.entrypoints.openai.sampling import chat_params
from folovllm.entrypoints.openai.state import ServerState, server_state
from folovllm.outputs import CompletionOutput

router = APIRouter()

# The fields of this API that ask for what the server does not have.
REFUSALS = {
    "store": Refusal("answers are not stored: keep them in the client, or leave it out", (False,)),
    "previous_response_id": Refusal("answers are not stored: send the whole conversation as input"),
    "conversation": Refusal("conversations are not stored: send the whole one as input"),
    "background": Refusal("a response ends with its request: leave it out", (False,)),
    "tools": Refusal("calls in an answer are not parsed; describe the functions in the instructions", ([],)),
    "tool_choice": Refusal("calls in an answer are not parsed; leave it out", ("none", "auto")),
    "include": Refusal("there is nothing to include; leave it out", ([],)),
    "reasoning": Refusal("the output is not parsed for reasoning; leave it out", ({},)),
    "text": Refusal('only {"format": {"type": "text"}} is supported', ({}, {"format": {"type": "text"}})),
    "top_logprobs": Refusal("use POST /v1/chat/completions for logprobs", (0,)),
    "prompt": Refusal("prompt templates are not stored; send input"),
    "truncation": Refusal("a conversation is never cut; shorten it, or leave this out", ("disabled",)),
}
OWN_NAMES = {"max_tokens": "max_output_tokens", "messages": "input"}  # of a chat's fields


class ResponsesRequest(ApiModel):
    """The body of POST /v1/responses."""

    model: str | None = None
    input: str | list[dict[str, Any]]  # a text, or messages with a role and a content
    instructions: str | None = None  # the system message
    max_output_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    seed: Int | None = None
    stream: bool | None = False
    metadata: dict[str, str] | None = None
    user: str | None = None
    priority: Int | None = 0
    cache_salt: str | None = None


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    return await create_response(server_state(request), body, request)


async def create_response(state: ServerState, body: ResponsesRequest, raw_request: Request) -> Response:
    """Answers one request. Raises ApiError for what is wrong with it, before anything is computed."""
    state.check_model(body.model)
    chat = as_chat(body)
    check_extra_fields(chat, state.unknown_fields)
    with fields_of_responses():
        params = chat_params(chat, state.sampling_defaults, state.engine.config.max_model_len)

    async def start() -> tuple[ResponseAnswer, Generation]:
        with state.admit(1), fields_of_responses():
            prompt = await chat_prompt(state, chat, params.max_tokens)
            answer = ResponseAnswer(body, prompt, state.model_names[0], params.temperature, params.top_p)
            return answer, await Generation.start(state, chat, answer.id, [prompt], params)

    async def run() -> Response:
        answer, generation = await start()
        async with generation:
            output = (await generation.results())[0]
            answer.usage.add(0, output)
            return json_answer(answer.whole(output.outputs[0]))

    if not body.stream:
        return await unless_client_leaves(raw_request, run())
    answer, generation = await start()
    events = answer.events(generation, state.event_stream.encode, raw_request.state.request_id)
    return GenerationStream(generation, events)


@contextlib.contextmanager
def fields_of_responses() -> Iterator[None]:
    """Writes the names that this API has for a field into the errors of a chat."""
    try:
        yield
    except ApiError as error:
        if error.param in OWN_NAMES:
            error.message = error.message.replace(error.param, OWN_NAMES[error.param])
            error.param = OWN_NAMES[error.param]
        raise


def as_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request in the words of /v1/chat/completions. Raises ApiError (400) for what has no such words."""
    extra = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    for name, refusal in REFUSALS.items():
        refusal.check(name, extra.pop(name, None))
    for name in extra:
        if name in ChatCompletionRequest.model_fields:
            instead = f"send {OWN_NAMES[name]}" if name in OWN_NAMES else "use POST /v1/chat/completions"
            raise bad_request(f"{name} is no field of /v1/responses: {instead}", name)
    messages = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _messages(body.input)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    same = ("temperature", "top_p", "top_k", "seed", "stream", "priority", "cache_salt")
    fields = {name: getattr(body, name) for name in same}
    return ChatCompletionRequest(**extra | fields, messages=messages, max_tokens=body.max_output_tokens)


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of `input`. Their parts have other names than in a chat: input_text, and output_text in answers."""
    if not items:
        raise bad_request("input is empty: send a text, or at least one message", "input")
    messages = []
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if item.get("type", "message") != "message":
            raise bad_request(f"{where} has the type {item['type']!r}, and only messages are supported", "input")
        content = item.get("content")
        if content is None and item.get("role") != "assistant":
            raise bad_request(f"{where} needs a content, which only an assistant's message may lack", "input")
        if isinstance(content, list):
            content = [_part(part, where) for part in content]
        messages.append({"role": item.get("role"), "content": content})
    return messages


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "text"):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise bad_request(f"{where}.content has a part of type {kind!r}, and only texts are supported", "input")
    return {"type": "text", "text": part.get("text")}


class ResponseAnswer:
    """The answer to one request, as a whole or as events."""

    def __init__(
        self, body: ResponsesRequest, prompt: TokenizedPrompt, model: str, temperature: float, top_p: float
    ) -> None:
        self.usage = Usage([prompt], 1)
        self.id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._number = -1  # of the last event
        self._shared: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "metadata": body.metadata or {},
            "user": body.user,
            "background": False,
            "error": None,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
        }

    def whole(self, completion: CompletionOutput) -> dict[str, Any]:
        """The response as it is at the end."""
        why = {"length": "max_output_tokens", "abort": "aborted"}.get(completion.finish_reason or "")
        status: Literal["completed", "incomplete"] = "incomplete" if why else "completed"
        item = self._item(status, [_text_part(completion.text)])
        return self._response(status, [item], {"reason": why} if why else None, self._usage())

    async def events(self, generation: Generation, encode: Encode, request_id: str) -> AsyncIterator[bytes]:
        """The events of a stream, in OpenAI's order. An error in the middle becomes the last event."""
        text, last = "", CompletionOutput(0, "", [])
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}

        def event(kind: str, **fields: Any) -> bytes:
            self._number += 1
            data = dumps({"type": kind, "sequence_number": self._number, **fields})
            return b"event: " + kind.encode() + b"\n" + encode(data)

        yield event("response.created", response=self._response("in_progress"))
        yield event("response.in_progress", response=self._response("in_progress"))
        yield event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield event("response.content_part.added", **place, part=_text_part(""))
        try:
            async for _, output in generation.outputs():
                self.usage.add(0, output)
                last = output.outputs[0]
                text += last.text
                if last.text:
                    yield event("response.output_text.delta", **place, delta=last.text, logprobs=[])
        except Exception as error:
            yield event("error", **_error(as_api_error(error, request_id)))
            return
        response = self.whole(dataclasses.replace(last, text=text))
        yield event("response.output_text.done", **place, text=text, logprobs=[])
        yield event("response.content_part.done", **place, part=_text_part(text))
        yield event("response.output_item.done", output_index=0, item=response["output"][0])
        yield event(f"response.{response['status']}", response=response)

    def _response(
        self,
        status: str,
        output: list[dict[str, Any]] | None = None,
        incomplete: dict[str, Any] | None = None,
        usage: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        own = {"status": status, "output": output or [], "incomplete_details": incomplete, "usage": usage}
        return {**self._shared, **own}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _usage(self) -> dict[str, Any]:
        chat = self.usage.total()
        return {
            "input_tokens": chat["prompt_tokens"],
            "input_tokens_details": chat["prompt_tokens_details"],
            "output_tokens": chat["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": chat["total_tokens"],
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _error(error: ApiError) -> dict[str, Any]:
    """The fields of an `error` event, which are those of an error answer without the layer around them."""
    fields: dict[str, Any] = error_body(error)["error"]
    return {"code": str(fields["code"]), "message": fields["message"], "param": fields["param"]}
