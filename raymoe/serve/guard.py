"""Who may ask: keys, their limits, and what is for administrators. Everything but /health is closed by default."""

import base64
import binascii
import ipaddress
import logging
import math
import time
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from raymoe.serve.errors import RETRY_AFTER_S, ApiError
from raymoe.serve.key_source import KeySource
from raymoe.serve.keys import Key, find
from raymoe.serve.limits import Limits
from raymoe.serve.openapi import OPEN_PATHS

log = logging.getLogger("ray.serve")  # which Serve writes to the log of the replica

ADMIN_PATHS = "/v1/admin/"


class Guard:
    """ASGI middleware: lets a request pass, or answers 401, 403 or 429.

    Where keys are configured, every path but the open ones needs one: as ``Authorization: Bearer KEY``, or as the
    password of HTTP's own Basic form, which browsers ask people for. Requests that cost work (POST, but for settings)
    count against the key's limits until their answer has been sent. Where none are configured, everybody may ask, and
    settings are changed from this machine only.

    Args:
        open_paths: need no key ever; one that ends in a slash opens what is below it, but "/" itself only.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeySource,
        clock: Callable[[], float] = time.monotonic,
        open_paths: tuple[str, ...] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._limits = Limits(clock)
        self._warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if is_open(path, self._open_paths):
            await self._app(scope, receive, send)
        elif self._keys.required:
            await self._by_key(scope, receive, send, path, headers)
        elif path.startswith(ADMIN_PATHS) and not is_local(scope, headers):
            message = "no API keys are configured, so settings are for requests from this machine only"
            await _refusal(message).response()(scope, receive, send)
        else:
            self._warn(scope, headers)
            await self._app(scope, receive, send)

    async def _by_key(self, scope: Scope, receive: Receive, send: Send, path: str, headers: Mapping[str, str]) -> None:
        presented = presented_key(headers.get("authorization", ""))
        key = find(self._keys.keys(), presented) if presented else None
        is_admin = path.startswith(ADMIN_PATHS)
        if key is None:
            answer = _unauthorized(presented is not None)
            browses = "text/html" in headers.get("accept", "")
            scheme = 'Basic realm="raymoe: any name, an API key as password"' if browses else "Bearer"
            await answer.response({"WWW-Authenticate": scheme})(scope, receive, send)
        elif is_admin and not key.admin:
            message = f'key "{key.name}" is not for settings; they need a key marked admin'
            await _refusal(message).response()(scope, receive, send)
        elif scope.get("method") != "POST" or is_admin:
            await self._app(scope, receive, send)
        else:
            await self._counted(scope, receive, send, key)

    async def _counted(self, scope: Scope, receive: Receive, send: Send, key: Key) -> None:
        exceeded = self._limits.enter(key)
        if exceeded is not None:
            wait_s = max(RETRY_AFTER_S, math.ceil(self._limits.wait_s(key)))
            error = ApiError(
                status=429,
                message=f"{exceeded}; try again in {wait_s} s",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._limits.leave(key)

    def _warn(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Once, when somebody from elsewhere asks and no keys are configured."""
        if not self._warned and not is_local(scope, headers):
            self._warned = True
            log.warning("requests come from other machines, and NO API KEYS are configured: anyone may ask anything")


def is_open(path: str, open_paths: tuple[str, ...]) -> bool:
    """Whether a path needs no key: it is one of those, or lies below one that ends in a slash (but for "/" itself)."""
    folders = tuple(folder for folder in open_paths if folder.endswith("/") and folder != "/")
    return path in open_paths or path.startswith(folders)


def presented_key(authorization: str) -> str | None:
    """The key in an Authorization header, if any."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip() or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def is_local(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Whether a request comes from this machine, and was meant for it by whoever sent it.

    A proxy's requests count as its clients', and so does a web page whose name was pointed at this machine: its
    requests carry that name as host.
    """
    client = scope.get("client")
    if client is None or any(name in headers for name in ("forwarded", "x-forwarded-for", "x-real-ip")):
        return False
    return is_loopback(client[0]) and is_loopback(_host_name(headers.get("host", "")))


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host if host.count(":") == 1 else host


def _unauthorized(presented: bool) -> ApiError:
    message = (
        "incorrect API key; ask the server's owner for one"
        if presented
        else 'no API key; send one as "Authorization: Bearer KEY"'
    )
    return ApiError(status=401, message=message, type="invalid_request_error", code="invalid_api_key")


def _refusal(message: str) -> ApiError:
    return ApiError(status=403, message=message, type="invalid_request_error", code="insufficient_permissions")
