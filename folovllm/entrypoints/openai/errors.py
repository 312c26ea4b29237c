"""ApiError: what goes wrong with a request, as OpenAI's clients expect to read it.

Milestone: M8. vLLM counterpart: ErrorResponse (vllm/entrypoints/openai/protocol.py) and the exception handlers of
vllm/entrypoints/openai/api_server.py. Ours differs: every error of every route has OpenAI's form, those of the web
framework included.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": 400}}

A route raises an ApiError. Everything else that a route may raise is translated by `as_api_error`, so that no traceback
reaches a client.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

logger = logging.getLogger(__name__)

# HTTP status -> OpenAI's `type`.
ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
INTERNAL_ERROR = "internal error: the server's log has the cause under this answer's X-Request-Id"


class ApiError(Exception):
    """One error answer. `type` follows from the status, and `code` is the status unless OpenAI has a word for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or ERROR_TYPES.get(status, "invalid_request_error")
        self.param = param
        self.code = status if code is None else code
        self.headers = dict(headers or {})


def bad_request(message: str, param: str | None = None, code: str | int | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, param: str | None = None, code: str | int | None = None) -> ApiError:
    return ApiError(404, message, param=param, code=code)


def too_many_requests(message: str, retry_after: int = 1) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(retry_after)})


def shutting_down() -> ApiError:
    message = "the server is shutting down and takes no new requests; send it to another one"
    return ApiError(503, message, headers={"Retry-After": "1"})


def internal_error() -> ApiError:
    """The answer to a fault of ours. Its cause is in the log and nowhere else."""
    return ApiError(500, INTERNAL_ERROR)


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON of an answer, and of an event in the middle of a stream."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)


def as_api_error(error: BaseException, request_id: str = "-") -> ApiError:
    """The ApiError for anything that a route or a stream may raise. A fault of ours is logged with its traceback.

    A ValueError is the engine's or a template's answer to bad input; its message names the fix.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return bad_request(str(error))
    from folovllm.engine.async_llm import EngineClosingError, EngineDeadError, RequestFailedError

    if isinstance(error, EngineClosingError):
        return shutting_down()
    if isinstance(error, EngineDeadError):
        return ApiError(500, "the engine has stopped and the server is about to exit; GET /health has the cause")
    if not isinstance(error, RequestFailedError):  # the engine has logged those
        logger.error("request %s failed", request_id, exc_info=error)
    return internal_error()
