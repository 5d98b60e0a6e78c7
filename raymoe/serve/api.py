"""The routes of OpenAI's API over an engine. Knows no Ray: the engine is whatever answers like ``EngineClient``."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from raymoe.engine.request import SamplingParams
from raymoe.errors import RaymoeError
from raymoe.serve.batch import Batch, merge
from raymoe.serve.body_limit import BodyLimit
from raymoe.serve.errors import ModelNotFoundError, describe
from raymoe.serve.render import ChatRenderer, CompletionRenderer, Renderer
from raymoe.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from raymoe.serve.shared import Shared
from raymoe.serve.streaming import EventStream, events
from raymoe.serve.watching import watching_routes

if TYPE_CHECKING:
    from raymoe.engine.service import Prompt
    from raymoe.observe.stats import ClusterStats

STATS_KEEP_S = 0.9  # pages ask about once a second, however many there are
MAX_BODY_BYTES = 8 << 20  # a prompt of a million tokens takes about 4 MB as text, 7 MB as token ids


class Backend(Protocol):
    """What answers."""

    def stream(self, prompt: "Prompt", params: SamplingParams | Mapping[str, Any]) -> AsyncGenerator[Batch]:
        """Batches of an answer. Closing the iterator cancels the request."""
        ...

    async def card(self) -> dict[str, Any]:
        """The model. Raises RaymoeError where generation does not work."""
        ...

    async def stats(self) -> "ClusterStats":
        """Devices and engine. Raises RaymoeError where the engine does not answer."""
        ...

    async def residency(self) -> dict[str, Any]:
        """Where every expert is."""
        ...

    async def timeline(self) -> dict[str, Any]:
        """The last few decode steps."""
        ...


class Api:
    """What the routes do."""

    def __init__(self, backend: Backend, model: str) -> None:
        self.backend = self._backend = backend
        self._model = model
        self._created = int(time.time())
        self._stats = Shared(backend.stats, STATS_KEEP_S)

    async def chat(self, request: ChatRequest) -> Response:
        """POST /v1/chat/completions."""
        renderer = ChatRenderer(self._model, include_usage=request.include_usage, logprobs=bool(request.logprobs))
        return await self._answer(request, request.conversation, request.sampling, renderer)

    async def complete(self, request: CompletionRequest) -> Response:
        """POST /v1/completions."""
        renderer = CompletionRenderer(
            self._model, include_usage=request.include_usage, logprobs=request.logprobs is not None
        )
        return await self._answer(request, request.prompt, request.sampling, renderer)

    async def _answer(
        self, request: GenerationRequest, prompt: "Prompt", params: SamplingParams, renderer: Renderer
    ) -> Response:
        """Wait for the first batch, so that what goes wrong until then has its own HTTP status."""
        try:
            self._check_model(request.model)
            batches = self._backend.stream(prompt, params)
            if not request.stream:
                return JSONResponse(renderer.whole(merge([batch async for batch in batches])))
            first = await anext(batches)
        except Exception as error:  # the edge of the process
            return describe(error).response()
        body = events(first, batches, renderer, include_usage=request.include_usage)
        return EventStream(body, batches)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model:
            raise ModelNotFoundError(f'the model "{name}" does not exist; "{self._model}" is served here')

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.model(self._model)]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME. Raises ModelNotFoundError."""
        self._check_model(name)
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
            return JSONResponse({"status": "unavailable", "model": self._model, **answer.body}, 503)
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
    for kind in (RequestValidationError, HTTPException, RaymoeError, Exception):
        app.add_exception_handler(kind, _as_json)
    app.post("/v1/chat/completions", response_model=None)(api.chat)
    app.post("/v1/completions", response_model=None)(api.complete)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{name:path}")(api.model)
    app.get("/v1/stats")(api.stats)
    app.get("/health", response_model=None)(api.health)
    app.include_router(watching_routes(api.backend, gather))
    return app


async def _as_json(request: Request, error: Exception) -> Response:
    headers = error.headers if isinstance(error, HTTPException) else None
    return describe(error).response(headers)
