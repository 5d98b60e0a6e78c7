"""The web application over an engine. Knows no Ray: the engine is whatever answers like ``EngineClient``."""

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from raymoe.errors import RaymoeError
from raymoe.serve import watching
from raymoe.serve.admin import Admin
from raymoe.serve.answering import Answering
from raymoe.serve.backend import Backend
from raymoe.serve.body_limit import BodyLimit
from raymoe.serve.crowd import CrowdLimit
from raymoe.serve.errors import describe
from raymoe.serve.guard import Guard
from raymoe.serve.key_source import KeySource
from raymoe.serve.openapi import OPEN_PATHS, describe_api
from raymoe.serve.shared import Shared
from raymoe.serve.tokens import Tokens

STATS_KEEP_S = 0.9  # pages ask about once a second, however many there are
MAX_BODY_BYTES = 8 << 20  # a prompt of a million tokens takes about 4 MB as text, 7 MB as token ids
MOST_CHOICES = 64  # of one request, where the engine would hold more
MOST_AT_ONCE = 1024  # requests under way, where nobody says how many the engine holds


class Api:
    """What the routes do.

    Args:
        model: the served model's name.
        most_choices: answers of one request that the engine could hold at a time.
        most_at_once: requests under way; more are refused before they are read.
        keys: who may ask; None: everybody.
    """

    def __init__(
        self,
        backend: Backend,
        model: str,
        *,
        most_choices: int = MOST_CHOICES,
        most_at_once: int = MOST_AT_ONCE,
        keys: KeySource | None = None,
    ) -> None:
        self.most_at_once = most_at_once
        self.backend = self._backend = backend
        self._model = model
        self._created = int(time.time())
        self._stats = Shared(backend.stats, STATS_KEEP_S)
        self.keys = keys or KeySource()
        self.answering = Answering(backend, model, min(most_choices, MOST_CHOICES))
        self.tokens = Tokens(backend, self.answering.check_model)
        self.admin = Admin(backend, self._stats.forget)

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.model(self._model)]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME. Raises ModelNotFoundError."""
        self.answering.check_model(name)
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "raymoe"}

    async def stats(self) -> dict[str, Any]:
        """GET /v1/stats: engine and devices, without the names of resident experts."""
        stats = (await self._stats.get()).as_dict()
        for device in stats["devices"].values():
            del device["resident_experts"]
        return stats

    async def health(self) -> Response:
        """GET /health: 200 where the engine can generate now, else 503."""
        try:
            card = await self._backend.card()
        except Exception as error:  # the edge of the process
            answer = describe(error)
            status = "draining" if answer.code == "draining" else "unavailable"
            return JSONResponse({"status": status, "model": self._model, **answer.body}, 503)
        return JSONResponse({"status": "ok", "model": card["name"]})


def create_app(
    api: Api,
    lifespan: AbstractAsyncContextManager[None] | None = None,
    gather: Callable[[], Awaitable[bytes]] | None = None,
) -> FastAPI:
    """The web application.

    Args:
        lifespan: entered when the server starts and left when it ends.
        gather: metrics of all nodes, as text; None: there are none.
    """
    app = FastAPI(title="raymoe", lifespan=(lambda _: lifespan) if lifespan is not None else None)
    app.add_middleware(BodyLimit, limit_bytes=MAX_BODY_BYTES)
    app.add_middleware(CrowdLimit, most=api.most_at_once)
    app.add_middleware(
        Guard, keys=api.keys, open_paths=(*OPEN_PATHS, *watching.OPEN_PATHS)
    )  # the outermost: who may not ask has nothing read
    for kind in (RequestValidationError, HTTPException, RaymoeError, Exception):
        app.add_exception_handler(kind, _as_json)
    app.post("/v1/chat/completions", response_model=None)(api.answering.chat)
    app.post("/v1/completions", response_model=None)(api.answering.complete)
    app.get("/v1/models", response_model=None)(api.models)
    app.get("/v1/models/{name:path}", response_model=None)(api.model)
    app.post("/tokenize", response_model=None)(api.tokens.tokenize)
    app.post("/detokenize", response_model=None)(api.tokens.detokenize)
    app.get("/v1/stats", response_model=None)(api.stats)
    app.get("/v1/admin/settings", response_model=None)(api.admin.settings)
    app.post("/v1/admin/settings", response_model=None)(api.admin.change)
    app.get("/health", response_model=None)(api.health)
    app.include_router(watching.watching_routes(api.backend, gather))
    describe_api(app, needs_keys=api.keys.required)
    return app


async def _as_json(request: Request, error: Exception) -> Response:
    headers = error.headers if isinstance(error, HTTPException) else None
    return describe(error).response(headers)
