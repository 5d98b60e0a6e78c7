"""Routes for those who look on: the page, the maps and the timeline that it draws, and metrics.

The page's files need no key: they hold nothing but themselves. What they ask for does, like all of ``/v1``.
"""

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from raymoe.serve.errors import describe
from raymoe.serve.shared import Shared

KEEP_S = 1.0  # pages ask about once a second
METRICS_KEEP_S = 2.0  # Ray's agents have news every few seconds only
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, and answered with 304: a new version is seen at once
}
OPEN_PATHS = ("/", "/page/")
"""Where no key is asked for: the page, and everything below the second."""


class Watched(Protocol):
    """What is looked at."""

    async def residency(self) -> dict[str, Any]:
        """Where every expert is."""
        ...

    async def timeline(self) -> dict[str, Any]:
        """The last few decode steps."""
        ...


def watching_routes(watched: Watched, gather: Callable[[], Awaitable[bytes]] | None = None) -> APIRouter:
    """The page at ``/``, its data below ``/v1/stats``, and ``/metrics``.

    Args:
        gather: metrics of all nodes as Prometheus' text; None where there are none, and no such route.
    """
    router = APIRouter()
    residency = Shared(lambda: watched.residency(), KEEP_S)
    timeline = Shared(lambda: watched.timeline(), KEEP_S)

    async def tell_residency() -> Response:
        """Where every expert is, by device: a byte per expert in base64, layer by layer."""
        return await _answer(residency)

    async def tell_timeline() -> Response:
        """What every process did in the last few decode steps."""
        return await _answer(timeline)

    router.get("/v1/stats/residency", response_model=None, include_in_schema=False)(tell_residency)
    router.get("/v1/stats/timeline", response_model=None, include_in_schema=False)(tell_timeline)
    router.get("/", response_model=None, include_in_schema=False)(page)
    router.get("/page/{name}", response_model=None, include_in_schema=False)(page_file)
    if gather is not None:
        gathered = Shared(gather, METRICS_KEEP_S)

        async def metrics() -> Response:
            """Metrics of all nodes, in Prometheus' text format."""
            from raymoe.serve.gathering import MEDIA_TYPE

            return Response(await gathered.get(), media_type=MEDIA_TYPE)

        router.get("/metrics", response_model=None, include_in_schema=False)(metrics)
    return router


async def _answer(shared: Shared[dict[str, Any]]) -> Response:
    try:
        return JSONResponse(await shared.get())
    except Exception as error:  # the edge of the process
        return describe(error).response()


async def page(request: Request) -> Response:
    """The page."""
    return _file(request, "index.html")


async def page_file(request: Request, name: str) -> Response:
    """A file of the page."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    kind = TYPES.get(name.rpartition(".")[2])
    found = PAGE_FILES.get(name) if kind is not None else None
    if found is None:
        raise HTTPException(404, "Not Found")
    body, tag = found
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)


def _page_files() -> dict[str, tuple[bytes, str]]:
    """Every file of the page with its tag: some fifty kB, read once. No path is ever made of what a client says."""
    folder = resources.files("raymoe.serve") / "page"
    bodies = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    return {name: (body, f'"{hashlib.sha256(body).hexdigest()[:16]}"') for name, body in bodies.items()}


PAGE_FILES = _page_files()
