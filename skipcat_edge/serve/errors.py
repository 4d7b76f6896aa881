"""What a client is told when its request cannot be answered."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from skipcat_edge.errors import UserError, first_line
from skipcat_edge.session import decode_error


class JSON(JSONResponse):
    """An answer in ASCII: half a surrogate pair, which a request may hold, is not UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class RequestError(Exception):
    """A request that gets no answer: the HTTP status, and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    def body(self) -> dict[str, Any]:
        """The answer's JSON, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": None}}


def request_error(error: Exception) -> RequestError:
    """What the client of a request that raised `error` is told."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return RequestError(400, error.message)
    if isinstance(error, RuntimeError):
        return RequestError(500, decode_error(str(error)).message)
    if isinstance(error, (ValueError, KeyError, TypeError)):  # what llama_cpp finds wrong in a request
        return RequestError(400, f"llama_cpp refuses this request: {first_line(error)}.")
    return RequestError(500, f"The answer failed: {first_line(error)}.")
