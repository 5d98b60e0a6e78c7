"""Refuses requests for work beyond a number, before anything is done for them."""

from starlette.types import ASGIApp, Receive, Scope, Send

from raymoe.errors import OverloadedError
from raymoe.serve.errors import describe


class CrowdLimit:
    """ASGI middleware: 429 for a POST while ``most`` of them are under way in this process. Looking on is not counted.

    Serve would queue what is beyond its own limits, without a word, and then answer in plain text; so this one is
    lower.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        if self._under_way >= self._most:
            error = OverloadedError(f"{self._under_way} requests are under way already; try again later")
            await describe(error).response()(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
