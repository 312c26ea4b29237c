"""build_app: all routes and what surrounds them, as one ASGI application.

Milestone: M8. vLLM counterpart: build_app in vllm/entrypoints/openai/api_server.py. Left out: embeddings, audio,
LoRA, and the documentation pages, which load scripts from another host. GET /openapi.json has the schema.
"""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from folovllm import __version__
from folovllm.entrypoints.openai import chat, completions, health, metrics, models, responses, tokenization
from folovllm.entrypoints.openai.errors import ApiError, as_api_error, error_response
from folovllm.entrypoints.openai.middleware import AnswerErrors, BodyLimit, Gate, RequestLog
from folovllm.entrypoints.openai.state import ServerState
from folovllm.entrypoints.web import routes as web


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorAnswer(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is refused; the message names the fix."},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot answer."},
}


def build_app(state: ServerState) -> FastAPI:
    """Returns the application. Its layers from the outside: log, CORS, errors, key, size of a body, routes."""
    options = state.options
    app = FastAPI(
        title="FoloVLLM",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None if options.disable_fastapi_docs else "/openapi.json",
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.root_path = options.root_path  # FastAPI deprecates it as an argument
    app.state.server = state
    for module in (completions, chat, responses, models, tokenization, health, metrics, web):
        app.include_router(module.router)
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(BodyLimit, limit=options.max_body_size)  # the layer that is added last is the outermost
    app.add_middleware(Gate, state=state)
    app.add_middleware(AnswerErrors)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog, state=state)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(as_api_error(error, request.state.request_id))
