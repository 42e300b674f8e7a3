"""What a client is told when something goes wrong: OpenAI's error object, and a status."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from qjax.errors import CheckpointError, EngineError, RequestError, UnsupportedError


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      message: for people; names the field, what it may be and what it was.
      param: the field at fault, where there is one.
      code: for programs, where OpenAI has one.
      headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is at fault, in the field `param`."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after: int = 1) -> ApiError:
    """Nothing is wrong with the request, but it cannot be taken now."""
    return ApiError(
        503, message, code="service_unavailable", headers={"Retry-After": str(retry_after)}
    )


def queue_full(message: str) -> ApiError:
    """There are too many requests already."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def as_api_error(error: Exception, fields: Collection[str]) -> ApiError | None:
    """What a client is told of an error that qjax raised; None where it is not one of its own.

    Args:
      fields: of the request; the one that the message begins with is `param`.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (RequestError, UnsupportedError)):
        words = re.findall(r"\w+", str(error)[:200])
        return invalid(str(error), next((word for word in words if word in fields), None))
    if isinstance(error, CheckpointError):
        # Of a chat template, by what a request puts into it. The path is none of the client's.
        reason = str(error).removeprefix(f"{error.file}, ")
        return invalid(reason, "messages" if "messages" in fields else None)
    if isinstance(error, EngineError):
        return ApiError(500, str(error))
    return None
