"""Every failure as OpenAI's error JSON with the right status.

What crosses a Serve handle arrives wrapped by Ray; ``unwrap`` gives our own error back.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException

from raymoe.errors import (
    CapacityError,
    DrainingError,
    EngineStoppedError,
    ExpertOutputError,
    ExpertUnavailableError,
    NotFiniteError,
    OverloadedError,
    RaymoeError,
    RequestError,
)

log = logging.getLogger("ray.serve")  # which Serve writes to the log of the replica

CODES = {NotFiniteError: "output_not_finite", ExpertOutputError: "expert_output", CapacityError: "out_of_memory"}
RETRY_AFTER_S = 1  # a waiting request takes about that long to get its turn
RESTART_RETRY_AFTER_S = 10  # Serve needs about that long to replace an engine


class RequestTimeoutError(RaymoeError):
    """A request took longer than serving.request_timeout_s."""


class ModelNotFoundError(RaymoeError):
    """A request names another model than the served one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiError:
    """An error as clients see it. ``type`` and ``code`` are OpenAI's words where it has any."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of an event in mid-stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The whole answer."""
        extra = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s is not None else {}
        return JSONResponse(self.body, self.status, headers={**(headers or {}), **extra})


def unwrap(error: BaseException) -> BaseException:
    """Our own error out of Ray's wrapping; anything else that Ray itself says means that the engine is gone."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    if isinstance(error, BackPressureError):
        return OverloadedError("too many requests are under way already; try again later")
    if isinstance(error, (RayError, RayServeException)) and not isinstance(error, RayTaskError):
        log.warning("the engine can't be reached: %s", error)
        return EngineStoppedError("the engine ended or can't be reached; it is being restarted, try again later")
    return error


def describe(error: BaseException) -> ApiError:
    """What a client is told. Unexpected errors are logged, and told without their inner details."""
    error = unwrap(error)
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return _http(error)
    message = str(error)
    match error:
        case RequestError():
            return ApiError(status=400, message=message, type="invalid_request_error", param=error.param)
        case ModelNotFoundError():
            return ApiError(
                status=404, message=message, type="invalid_request_error", param="model", code="model_not_found"
            )
        case OverloadedError():
            retry_after_s = max(RETRY_AFTER_S, math.ceil(error.retry_after_s or 0))
            return ApiError(
                status=429, message=message, type="rate_limit_error", code="overloaded", retry_after_s=retry_after_s
            )
        case DrainingError():
            return ApiError(
                status=503, message=message, type="unavailable", code="draining", retry_after_s=RESTART_RETRY_AFTER_S
            )
        case EngineStoppedError() | ExpertUnavailableError():
            return ApiError(
                status=503, message=message, type="unavailable", code="unavailable", retry_after_s=RESTART_RETRY_AFTER_S
            )
        case NotFiniteError() | CapacityError():  # of the model or the machine, and for this request alone
            log.error("a request failed: %s", error)
            return ApiError(status=500, message=message, type="server_error", code=CODES[type(error)])
        case RequestTimeoutError():
            return ApiError(status=504, message=message, type="timeout", code="timeout")
    log.error("a request failed unexpectedly", exc_info=error)
    return ApiError(status=500, message="internal error; the server's log says more", type="server_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, and where."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(
            status=400, message=f"the body is not valid JSON: {first['ctx']['error']}", type="invalid_request_error"
        )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "refused":
        return ApiError(status=400, message=message, type="invalid_request_error", param=first["ctx"]["param"])
    if first["type"] == "extra_forbidden" and len(place) == 1:
        return ApiError(
            status=400,
            message=f"unrecognized request argument supplied: {place[0]}",
            type="invalid_request_error",
            param=place[0],
            code="unknown_parameter",
        )
    if not place:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return ApiError(status=400, message=message, type="invalid_request_error")
    param = ".".join(place)
    return ApiError(status=400, message=f"{param}: {message}", type="invalid_request_error", param=param)


def _http(error: HTTPException) -> ApiError:
    """An answer of the web framework itself: no such path, wrong method, body too large."""
    codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    return ApiError(
        status=error.status_code,
        message=str(error.detail),
        type="invalid_request_error" if error.status_code < 500 else "server_error",
        code=codes.get(error.status_code),
    )
