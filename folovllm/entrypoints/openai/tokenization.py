"""/tokenize and /detokenize: the tokens of a text or of a conversation, and the text of tokens.

Milestone: M8. vLLM counterpart: vllm/entrypoints/openai/serving_tokenization.py. Left out: /tokenizer_info. Ours
differs: the two need the API key if there is one, as they are work that a stranger could order.
"""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from folovllm.engine.tokenizer import Tokenizer
from folovllm.entrypoints.openai.chat import check_messages
from folovllm.entrypoints.openai.errors import bad_request, refusing
from folovllm.entrypoints.openai.prompts import MAX_CHARACTERS, Limit
from folovllm.entrypoints.openai.protocol import ApiModel
from folovllm.entrypoints.openai.refusals import check_extra_fields
from folovllm.entrypoints.openai.state import ServerState, server_state

router = APIRouter()

MAX_TOKENS = 200_000  # the tokenizer does not give up the GIL while it decodes: all streams wait
LONG = 4096  # tokens; more are decoded in a thread, so that streams go on


class TokenizeRequest(ApiModel):
    """Either `prompt` or `messages`. The fields below `messages` shape the prompt of a conversation, as in a chat."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # None: True, but False for a conversation
    return_token_strs: bool | None = False
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class TokenizeAnswer(ApiModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(ApiModel):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class DetokenizeAnswer(ApiModel):
    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeAnswer:
    state = server_state(request)
    state.check_model(body.model)
    check_extra_fields(body, state.unknown_fields)
    tokenizer = _tokenizer(state)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("the body needs either a prompt or messages", "prompt")
    with refusing("prompt" if body.messages is None else "messages"):
        token_ids = await (_of_text(state, body) if body.messages is None else _of_conversation(state, body))
    strings = [tokenizer.backend.id_to_token(i) or "" for i in token_ids] if body.return_token_strs else None
    return TokenizeAnswer(
        count=len(token_ids), max_model_len=state.engine.config.max_model_len, tokens=token_ids, token_strs=strings
    )


async def _of_text(state: ServerState, body: TokenizeRequest) -> list[int]:
    text = body.prompt or ""
    if len(text) > MAX_CHARACTERS:
        raise bad_request(f"prompt holds {len(text)} characters: {MAX_CHARACTERS} are allowed", "prompt")
    return await state.engine.encode(text, body.add_special_tokens is not False)


async def _of_conversation(state: ServerState, body: TokenizeRequest) -> list[int]:
    messages = body.messages or []
    check_messages(messages)
    Limit("messages", state.engine.input_processor, keep=None).check_entries(messages)
    prompt = await state.engine.render_chat(
        messages,
        state.chat_template,
        body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
    )
    if body.add_special_tokens:
        return await state.engine.encode(prompt["prompt"], True)
    token_ids: list[int] = prompt["prompt_token_ids"]
    return token_ids


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeAnswer:
    state = server_state(request)
    state.check_model(body.model)
    tokenizer = _tokenizer(state)
    if len(body.tokens) > MAX_TOKENS:
        raise bad_request(f"tokens holds {len(body.tokens)} tokens: {MAX_TOKENS} are allowed", "tokens")
    if unknown := next((i for i in body.tokens if i >= tokenizer.vocab_size), None):
        raise bad_request(f"tokens: {unknown} is no token; the ids are 0 to {tokenizer.vocab_size - 1}", "tokens")
    if len(body.tokens) > LONG:
        return DetokenizeAnswer(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens, False))
    return DetokenizeAnswer(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))


def _tokenizer(state: ServerState) -> Tokenizer:
    if state.engine.tokenizer is None:
        raise bad_request("this server has no tokenizer: it was started with --skip-tokenizer-init")
    return state.engine.tokenizer
