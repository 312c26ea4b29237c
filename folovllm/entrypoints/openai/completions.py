"""POST /v1/completions: prompts as text or token ids, one or many, and what the model writes after each.

Milestone: M8. vLLM counterpart: OpenAIServingCompletion (vllm/entrypoints/openai/serving_completion.py).
Left out: beam search, suffix, prompt embeddings, structured output.

Two differences to vLLM: `echo` echoes the prompt also with `return_token_ids`, and `text_offset` counts the echoed
prompt in a stream, too.
"""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from folovllm.engine.tokenizer import Tokenizer
from folovllm.entrypoints.openai.answers import (
    Chunks,
    Encode,
    Usage,
    includes_continuous_usage,
    includes_usage,
    respond,
)
from folovllm.entrypoints.openai.generation import Generation, answer_id
from folovllm.entrypoints.openai.logprobs import CompletionLogprobs, prompt_logprobs
from folovllm.entrypoints.openai.prompts import TokenizedPrompt, completion_prompts
from folovllm.entrypoints.openai.protocol import CompletionRequest
from folovllm.entrypoints.openai.refusals import check_extra_fields
from folovllm.entrypoints.openai.sampling import check_stream_fields, completion_params
from folovllm.entrypoints.openai.state import ServerState, server_state
from folovllm.outputs import CompletionOutput, LogprobsOnePosition, RequestOutput

router = APIRouter()
PromptLogprobs = list[LogprobsOnePosition | None]


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues one prompt or several."""
    return await create_completion(server_state(request), body, request)


async def create_completion(state: ServerState, body: CompletionRequest, raw_request: Request) -> Response:
    """Answers one request. Raises ApiError for what is wrong with it, before anything is computed."""
    state.check_model(body.model)
    check_extra_fields(body, state.unknown_fields)
    check_stream_fields(body)
    params = completion_params(body, state.sampling_defaults, state.engine.config.max_model_len)
    request_id = answer_id("cmpl", body, raw_request)

    async def start() -> tuple[CompletionAnswer, Generation]:
        with state.admit(body.num_completions):
            prompts = await completion_prompts(state, body, params.max_tokens)
            answer = CompletionAnswer(body, prompts, request_id, state.model_names[0], state.engine.tokenizer)
            return answer, await Generation.start(state, body, request_id, prompts, params)

    return await respond(state, body, raw_request, start)


class CompletionAnswer:
    """The answer to one request, written as a whole or in chunks. Prompt p's choices are p * n ... p * n + n - 1."""

    def __init__(
        self,
        body: CompletionRequest,
        prompts: Sequence[TokenizedPrompt],
        request_id: str,
        model: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._body, self._prompts, self._tokenizer = body, prompts, tokenizer
        self._shared = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._usage = Usage(prompts, body.num_choices)
        self._logprobs: dict[int, CompletionLogprobs] = {}  # of the choices that have begun
        # What `echo` with `logprobs` needs in a stream: the logprobs of each prompt, and what must wait for them.
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._waiting: dict[int, list[CompletionOutput]] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for prompt_index, output in enumerate(outputs):
            self._usage.add(prompt_index, output)
            self._prompt_logprobs[prompt_index] = self._of_prompt(prompt_index, output)
            for completion in output.outputs:
                choice = self._choice(prompt_index, completion)
                choices.append({**choice, "prompt_logprobs": prompt_logprobs(output.prompt_logprobs)})
        more = {"service_tier": None, "system_fingerprint": None, "usage": self._usage.total()}
        return {**self._shared, "choices": choices, **more}

    async def chunks(self, outputs: AsyncIterator[tuple[int, RequestOutput]], encode: Encode) -> AsyncIterator[bytes]:
        chunks = Chunks(self._shared, encode, includes_usage(self._body))
        continuous = includes_continuous_usage(self._body)
        async for prompt_index, output in outputs:
            self._usage.add(prompt_index, output)
            written = []
            for completion in self._ready(prompt_index, output):
                choice = self._choice(prompt_index, completion)
                more = {"usage": self._usage.so_far(choice["index"])} if continuous else {}
                written.append(chunks.write([choice], **more))
            if written:
                yield b"".join(written)
        if includes_usage(self._body):
            yield chunks.write([], usage=self._usage.total())

    def _ready(self, prompt_index: int, output: RequestOutput) -> list[CompletionOutput]:
        """The completions that can be shown now.

        With `echo` and `logprobs` each choice begins with the logprobs of the prompt. They come with the first output
        of choice 0, and the other choices may be faster: unlike that one, they can use the prefix cache.
        """
        if not (self._body.echo and self._body.logprobs is not None) or prompt_index in self._prompt_logprobs:
            return output.outputs
        waiting = self._waiting.setdefault(prompt_index, [])
        waiting += output.outputs
        if output.prompt_logprobs is None and not output.finished:
            return []
        self._prompt_logprobs[prompt_index] = self._of_prompt(prompt_index, output)
        return self._waiting.pop(prompt_index)

    def _of_prompt(self, prompt_index: int, output: RequestOutput) -> PromptLogprobs:
        """The logprobs of a prompt: nulls if the request was aborted before they were computed."""
        return output.prompt_logprobs or [None] * len(self._prompts[prompt_index].token_ids)

    def _choice(self, prompt_index: int, completion: CompletionOutput) -> dict[str, Any]:
        """A choice of the answer, or of a chunk: the first chunk of a choice brings the prompt, if asked."""
        body, prompt = self._body, self._prompts[prompt_index]
        index = prompt_index * body.num_choices + completion.index
        is_first = index not in self._logprobs
        if is_first:
            self._logprobs[index] = CompletionLogprobs(self._tokenizer, bool(body.return_tokens_as_token_ids))
        text, token_ids = completion.text, completion.token_ids
        positions: list[LogprobsOnePosition | None] = list(completion.logprobs or ())
        if body.echo and body.max_tokens == 0:
            text, token_ids, positions = "", [], []  # the engine cannot make less than one token
        if body.echo and is_first:
            text, token_ids = (prompt.text or "") + text, prompt.token_ids + token_ids
            positions = self._prompt_logprobs.get(prompt_index, []) + positions
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if body.logprobs is None else self._logprobs[index].shape(token_ids, positions),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if body.return_token_ids:
            choice["prompt_token_ids"] = prompt.token_ids if is_first else None
            choice["token_ids"] = completion.token_ids
        return choice
