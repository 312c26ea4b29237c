"""OpenAI's form of every error: what is shown of it, and what stays in the log."""

import json
import logging

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from folovllm.engine.async_llm import EngineClosingError, EngineDeadError, RequestFailedError
from folovllm.entrypoints.openai.errors import ApiError, as_api_error, bad_request, error_body, error_response, refusing

pytestmark = pytest.mark.m8


class Message(BaseModel):
    role: str


class Body(BaseModel):
    messages: list[Message]
    n: int = 1
    stop: str | list[str] | None = None


def validation_error(value: object) -> RequestValidationError:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(value)
    return RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in caught.value.errors()])


def test_the_type_follows_from_the_status_and_the_code_is_the_status() -> None:
    assert error_body(ApiError(401, "no"))["error"] == {
        "message": "no", "type": "authentication_error", "param": None, "code": 401,
    }  # fmt: skip
    types = {status: ApiError(status, "").type for status in (400, 404, 413, 415, 429, 500, 503)}
    assert types == {
        400: "invalid_request_error",
        404: "not_found_error",
        413: "invalid_request_error",
        415: "invalid_request_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "unavailable_error",
    }
    assert bad_request("x", "n", code="too_large").code == "too_large"


def test_a_fault_of_a_field_names_the_field_and_not_its_value() -> None:
    secret = "my secret prompt"
    error = as_api_error(validation_error({"messages": [{"role": "user"}, {"role": {"x": secret}}]}))
    assert (error.status, error.param) == (400, "messages.1.role")
    assert "messages.1.role" in error.message and secret not in error.message
    assert "http" not in error.message, "pydantic's errors have a URL each"


def test_an_error_of_pydantic_itself_has_no_url() -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"messages": "x"})
    error = as_api_error(caught.value)
    assert (error.status, error.param) == (400, "messages") and "http" not in error.message


def test_many_faults_are_cut_short() -> None:
    error = as_api_error(validation_error({"messages": [{"role": 1}] * 50, "n": "x"}))
    assert error.param == "messages.0.role" and error.message.endswith("; ...")
    assert error.message.count("role") == 3


def test_a_field_of_several_types_has_one_name() -> None:
    error = as_api_error(validation_error({"messages": [], "stop": ["a", 5]}))
    assert error.param == "stop" and "str]" not in error.message


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not valid UTF-8"),
        (ValueError("Exceeds the limit (4300 digits) for integer string conversion"), "too many digits"),
        (OSError("x"), "cannot be read"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_400_that_says_why(cause: Exception, message: str) -> None:
    error = HTTPException(400, "There was an error parsing the body")
    error.__cause__ = cause
    assert as_api_error(error).status == 400 and message in as_api_error(error).message


def test_an_api_error_from_below_the_framework_comes_through() -> None:
    """FastAPI wraps what the reading of the body raises."""
    too_large = ApiError(413, "too large")
    error = HTTPException(400, "There was an error parsing the body")
    error.__cause__ = too_large
    assert as_api_error(error) is too_large


def test_the_engines_errors_have_their_status() -> None:
    with pytest.raises(ApiError) as refused, refusing("temperature"):
        raise ValueError("temperature must be ...")
    assert (refused.value.status, refused.value.message) == (400, "temperature must be ...")
    assert refused.value.param == "temperature"
    assert as_api_error(ValueError("of our own")).status == 500
    assert as_api_error(EngineClosingError("closing")).status == 503
    assert as_api_error(EngineDeadError("killed")).status == 500
    assert as_api_error(RequestFailedError("failed")).status == 500


def test_an_internal_error_goes_to_the_log_with_the_request_id_and_not_to_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        error = as_api_error(ZeroDivisionError("at /home/user/secret.py"), "req-1")
    assert error.status == 500 and "secret" not in error.message
    assert "req-1" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_message_with_half_a_surrogate_pair_can_be_sent() -> None:
    body = bytes(error_response(bad_request("no model '\ud83d'")).body)
    assert json.loads(body)["error"]["message"] == "no model '\\ud83d'"


def test_a_long_message_is_cut() -> None:
    assert len(bad_request("x" * 10**6).message) == 2000
