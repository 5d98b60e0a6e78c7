"""The application's front door: HTTP routes, and the methods that Python handles call."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from raymoe.actors.lease import Lease
from raymoe.config import ClusterConfig
from raymoe.engine.request import Chunk, Result, collect
from raymoe.errors import RaymoeError
from raymoe.serve.api import Api, create_app
from raymoe.serve.client import EngineClient
from raymoe.serve.gathering import Gatherer, ray_nodes
from raymoe.serve.key_source import KeySource
from raymoe.serve.keys import Key

if TYPE_CHECKING:
    from raymoe.engine.prompts import Prompt
    from raymoe.observe.stats import ClusterStats

log = logging.getLogger("ray.serve")  # which Serve writes to the log of the replica

FIRST_LOOK_S = 1.0  # between looks whether the engine has started


class Ingress:
    """Stateless but for its lease: it keeps the workers alive, so that they outlive a crash of the engine.

    ``serve.get_app_handle(NAME)`` is a handle to this class: ``generate``, ``stream`` (with
    ``.options(stream=True)``) and ``stats`` answer there as ``raymoe.launch``'s do.
    """

    def __init__(
        self, config: ClusterConfig, engine: DeploymentHandle, keys: tuple[Key, ...], most_at_once: int
    ) -> None:
        self._config = config
        self._most_at_once = most_at_once
        self._client = EngineClient(engine, config.serving.request_timeout_s)
        file = config.serving.keys_file
        self._keys = KeySource(Path(file).expanduser() if file is not None else None, keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica is constructed."""
        context = serve.get_replica_context()
        holder = f"ingress-{context.replica_id.unique_id}"
        lifespan = holding(self._client, lambda: Lease(context.app_name, holder))
        trunk = self._config.trunk
        api = Api(
            self._client,
            self._config.model.served_name,
            most_choices=trunk.max_running + trunk.max_waiting,
            most_at_once=self._most_at_once,
            keys=self._keys,
        )
        if not self._keys.required:
            log.warning("NO API KEYS are configured: anyone who reaches the HTTP port may ask the model anything")
        return create_app(api, lifespan, Gatherer(context.app_name, ray_nodes).gather)

    async def generate(self, prompt: "Prompt", **options: Any) -> Result:
        """A whole answer. ``options`` are the fields of SamplingParams; max_tokens defaults to 128."""
        return collect([chunk async for chunk in self.stream(prompt, **options)])

    async def stream(self, prompt: "Prompt", **options: Any) -> AsyncGenerator[Chunk]:
        """The answer in chunks as it is made. Closing the stream cancels the request."""
        async with contextlib.aclosing(self._client.stream(prompt, options)) as batches:
            async for batch in batches:
                for chunk in batch.chunks:
                    yield chunk

    async def stats(self) -> "ClusterStats":
        """Devices and engine."""
        return await self._client.stats(names=True)

    async def drain(self, limit_s: float) -> int:
        """See ``EngineServer.drain``: nothing new is taken, whichever ingress it comes to."""
        return await self._client.drain(limit_s)


@contextlib.asynccontextmanager
async def holding(client: EngineClient, take: Callable[[], Lease]) -> AsyncIterator[None]:
    """Hold a lease from the engine's first sign of life until the replica ends.

    Not earlier: what a start that failed has left must end.
    """
    leases: list[Lease] = []

    async def wait_and_take() -> None:
        while not leases:
            try:
                await client.card()
                leases.append(take())
            except RaymoeError:
                await asyncio.sleep(FIRST_LOOK_S)

    waiting = asyncio.create_task(wait_and_take())
    try:
        yield
    finally:
        waiting.cancel()
        for lease in leases:
            await asyncio.to_thread(lease.close)
