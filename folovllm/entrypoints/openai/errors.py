"""ApiError: what goes wrong with a request, as OpenAI's clients expect to read it.

Milestone: M8. vLLM counterpart: ErrorResponse (vllm/entrypoints/openai/protocol.py) and the exception handlers of
vllm/entrypoints/openai/api_server.py. Ours differs: every error of every route has OpenAI's form, those of the web
framework included.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": 400}}

A route raises an ApiError. Everything else that a route may raise is translated by `as_api_error`, so that no traceback
reaches a client: the complaints of pydantic and of the web framework, and internal errors.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from folovllm.engine.async_llm import EngineClosingError, EngineDeadError, RequestFailedError

logger = logging.getLogger(__name__)

# HTTP status -> OpenAI's `type`.
ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
LONGEST_MESSAGE = 2000  # characters: a message may quote what the client has sent
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
        self.message = _printable(message)
        self.type = type or ERROR_TYPES.get(status, "invalid_request_error")
        self.param = param
        self.code = status if code is None else code
        self.headers = dict(headers or {})


def bad_request(message: str, param: str | None = None, code: str | int | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


@contextlib.contextmanager
def refusing(param: str | None = None) -> Iterator[None]:
    """Makes the ValueErrors of the engine's checks answers with status 400. Wrap only what checks a request."""
    try:
        yield
    except ValueError as error:
        raise bad_request(str(error), param) from None


def not_found(message: str, param: str | None = None, code: str | int | None = None) -> ApiError:
    return ApiError(404, message, param=param, code=code)


def too_many_requests(message: str, retry_after: int = 1) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(retry_after)})


def shutting_down() -> ApiError:
    message = "the server is shutting down and takes no new requests; send it to another one"
    return ApiError(503, message, headers={"Retry-After": "1"})


def internal_error() -> ApiError:
    """The answer to an error in the server itself. Its cause is in the log and nowhere else."""
    return ApiError(500, INTERNAL_ERROR)


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON of an answer, and of an event in the middle of a stream."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)


def as_api_error(error: BaseException, request_id: str = "-") -> ApiError:
    """Returns the ApiError for anything that a route or a stream may raise. Logs an internal error with its traceback.

    A ValueError counts as internal. The engine and the chat template answer bad input with one, and what calls them
    makes a `bad_request` of it (see `refusing`): once a request is in the engine, a ValueError is a bug of the server.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _of_validation(error.errors())
    if isinstance(error, HTTPException):
        return _of_framework(error)
    if isinstance(error, EngineClosingError):
        return shutting_down()
    if isinstance(error, EngineDeadError):
        return ApiError(500, "the engine has stopped and the server is about to exit; GET /health has the cause")
    if not isinstance(error, RequestFailedError):  # the engine has logged those
        logger.error("request %s failed", request_id, exc_info=error)
    return internal_error()


def _of_validation(faults: Sequence[Any]) -> ApiError:
    """The ApiError for pydantic's complaints about a body. It names the first fields and leaves out what they held."""
    if faults and faults[0]["type"] == "json_invalid":
        place, what = faults[0]["loc"][-1], faults[0].get("ctx", {}).get("error", "")
        return bad_request(f"the body is not valid JSON: {what} at character {place}")
    named = [(_field(fault["loc"]), str(fault["msg"]).removeprefix("Value error, ")) for fault in faults]
    shown = "; ".join(f"{field}: {message}" if field else f"the body: {message}" for field, message in named[:3])
    return bad_request(shown + ("; ..." if len(named) > 3 else ""), param=named[0][0] or None)


def _field(location: Sequence[str | int]) -> str:
    """E.g. ("body", "messages", 0, "role") -> "messages.0.role".

    Where a field may have several types, pydantic adds the name of the one it has tried: ("body", "stop", "list[str]",
    0) -> "stop".
    """
    names = list(map(str, location[1:] if location and location[0] in ("body", "path", "query") else location))
    types = [i for i, name in enumerate(names) if name in ("str", "int", "float", "bool") or "[" in name]
    return ".".join(names[: types[0]] if types else names)


def _of_framework(error: HTTPException) -> ApiError:
    """The ApiError for one that the web framework raises: no such path, another method, a body that cannot be read."""
    cause = error.__cause__
    if isinstance(cause, ApiError):  # from `middleware.BodyLimit`, while the framework read the body
        return cause
    messages = {
        400: _unreadable(cause),
        404: "there is nothing at this path; the API is below /v1, such as /v1/chat/completions",
        405: f"this path does not take this method; it takes {(error.headers or {}).get('Allow', 'others')}",
    }
    return ApiError(error.status_code, messages.get(error.status_code, str(error.detail)), headers=error.headers)


def _unreadable(cause: BaseException | None) -> str:
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply"
    if isinstance(cause, UnicodeDecodeError):
        return "the body is not valid UTF-8"
    if isinstance(cause, ValueError):  # Python's limit on the digits of an integer
        return "the body holds an integer with too many digits"
    return "the body cannot be read"


def _printable(text: str) -> str:
    """`text` in a length and in characters that any answer can hold: half of a surrogate pair has no UTF-8 form."""
    short = text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 4] + " ..."
    return short.encode("utf-8", "backslashreplace").decode("utf-8")
