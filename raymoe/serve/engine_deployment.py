"""The engine behind a Serve handle: trunk, KV cache and sampling in one replica, experts on their workers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve

from raymoe.config import ClusterConfig, UserConfig
from raymoe.engine.request import Chunk, SamplingParams
from raymoe.errors import DrainingError, EngineStoppedError, RaymoeError
from raymoe.serve.batch import Batch
from raymoe.serve.errors import RequestTimeoutError
from raymoe.serve.inbox import Bell, Inbox

if TYPE_CHECKING:
    from raymoe.actors.session import Session
    from raymoe.engine.prompts import Prompt
    from raymoe.observe.stats import ClusterStats

log = logging.getLogger("ray.serve")  # which Serve writes to the log of the replica

DRAIN_LOOK_S = 0.05  # between looks whether the last answer has ended


class EngineServer:
    """Answers prompts as streams of batches.

    The constructor blocks until the model is ready and raises RaymoeError where it can't be; Serve then gives the
    deployment up.
    """

    def __init__(self, config: ClusterConfig) -> None:
        from raymoe.actors.session import Session  # torch is needed in the replica, not where the app is wired

        app = serve.get_replica_context().app_name
        self._start(Session(config, app, lambda stage: log.info("%s: %s", app, stage)), config)

    def _start(self, session: "Session", config: ClusterConfig) -> None:
        self._session: Session | None = session
        self._service = session.service
        self._config = config
        self._has_started = self._draining = False
        self._streams = 0
        self._timeout_s = config.serving.request_timeout_s
        self._token_texts: dict[int, str] = {}
        self._bell: Bell | None = None

    async def stream(self, prompt: "Prompt", params: SamplingParams | Mapping[str, Any]) -> AsyncGenerator[Batch]:
        """An answer, in batches of chunks that were ready together; the first one is empty and says "accepted".

        Closing the generator cancels the request. Raises RequestError, OverloadedError, DrainingError or
        EngineStoppedError, and RequestTimeoutError where it takes longer than serving.request_timeout_s.

        Args:
            params: how to sample; a mapping has the fields of SamplingParams and ``ModelService``'s defaults.
        """
        self._streams += 1
        try:
            async with contextlib.aclosing(self._answer(prompt, _sampling(params))) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._streams -= 1

    async def _answer(self, prompt: "Prompt", params: SamplingParams) -> AsyncGenerator[Batch]:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        if self._bell is None or self._bell.loop is not asyncio.get_running_loop():
            self._bell = Bell()
        inbox = Inbox(self._bell)
        request = await self._submit(prompt, params, inbox)
        finished = False
        try:
            yield Batch()
            while not finished:
                items = await inbox.take(deadline)
                chunks = tuple(item for item in items if isinstance(item, Chunk))
                errors = [item for item in items if isinstance(item, BaseException)]
                finished = bool(errors) or chunks[-1].finish_reason is not None
                if chunks:
                    yield Batch(chunks=chunks, token_texts=self._texts(chunks))
                if errors:
                    raise errors[0]
        except TimeoutError as error:
            raise RequestTimeoutError(f"the request took longer than {self._timeout_s:g} s and was ended") from error
        finally:
            if not finished:
                self._service.cancel(request)

    async def _submit(self, prompt: "Prompt", params: SamplingParams, inbox: Inbox) -> Any:
        """Queue the request off the event loop, for encoding a long prompt takes a while."""
        submitted = asyncio.ensure_future(asyncio.to_thread(self._service.submit, prompt, params, inbox.put))
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(self._cancel_submitted)
            raise

    def _cancel_submitted(self, submitted: "asyncio.Future[Any]") -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._service.cancel(submitted.result())

    def _texts(self, chunks: tuple[Chunk, ...]) -> dict[int, str]:
        """Texts of the tokens whose log probabilities are told."""
        ids = {token for chunk in chunks for item in chunk.logprobs for token in (item.token_id, *dict(item.top))}
        return {token: self._text(token) for token in ids}

    def _text(self, token: int) -> str:
        if token not in self._token_texts:
            tokenizer = self._service.tokenizer
            self._token_texts[token] = "" if tokenizer is None else str(tokenizer.decode([token]))
        return self._token_texts[token]

    async def card(self) -> dict[str, Any]:
        """The served model: ModelCard's fields.

        Raises EngineStoppedError where generation no longer works, and DrainingError where nothing new is taken. A
        plain dict, for the record's own module would bring torch into the ingress.
        """
        self.check_health()
        if self._draining:
            raise DrainingError("the server is about to end and takes no new requests")
        return asdict(self._service.card)

    async def stats(self, names: bool = True) -> "ClusterStats":
        """Devices and engine; with ``names`` also those of the resident experts."""
        assert self._session is not None
        return await asyncio.to_thread(self._session.stats, names)

    async def residency(self) -> dict[str, Any]:
        """Where every expert is; see ``Observer.residency``."""
        assert self._session is not None
        return await asyncio.to_thread(self._session.observer.residency)

    async def timeline(self) -> dict[str, Any]:
        """The last few decode steps; see ``Observer.timeline``."""
        assert self._session is not None
        return await asyncio.to_thread(self._session.observer.timeline)

    async def tokenize(self, prompt: "Prompt") -> list[int]:
        """Token ids of a prompt. Raises RequestError for one that the model can't read."""
        return await asyncio.to_thread(self._service.encode, prompt)

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of token ids. Raises RequestError for ids that have none."""
        return await asyncio.to_thread(self._service.prompts.decode, token_ids)

    async def settings(self) -> dict[str, Any]:
        """The settings of scheduling in force."""
        assert self._session is not None
        return self._session.scheduling.model_dump(mode="json")

    async def change_settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Change some settings until the next start or change of ``user_config``; returns all.

        Raises ConfigError that names what is wrong, and changes nothing then.
        """
        assert self._session is not None
        await asyncio.to_thread(partial(self._session.reconfigure, **changes))
        log.info("settings were changed: %s", changes)
        return await self.settings()

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve at the start, and when a deployment's ``user_config`` was changed: no restart then.

        The settings become those of the cluster configuration with ``user_config: {scheduling: {…}}`` upon them; what
        it no longer names goes back. At the start a wrong one raises ConfigError and so fails the deployment. Later,
        the settings in force stay: Serve would replace a replica that raises, and with it lose every running answer.
        The reason is logged, and told by the stats as ``refused_settings``.
        """
        assert self._session is not None
        try:
            settings = UserConfig.settings(user_config, self._config.scheduling)
            await asyncio.to_thread(self._session.schedule, settings)
        except RaymoeError as error:
            if not self._has_started:
                raise
            self._session.refused_settings = str(error)
            log.error("new settings were refused, the old ones stay: %s", error)
        else:
            self._session.refused_settings = None

    async def drain(self, limit_s: float) -> int:
        """Take nothing new, and wait until what is under way has ended. For good: this replica is about to end.

        What has not ended after ``limit_s`` seconds is, with EngineStoppedError; returns how many that were.
        """
        self._draining = True
        self._service.drain()
        end_s = time.monotonic() + limit_s
        while self._streams and time.monotonic() < end_s:
            await asyncio.sleep(DRAIN_LOOK_S)
        if left := self._streams:
            self._service.give_up(EngineStoppedError("the server was ended before the answer was complete"))
        return left

    def check_health(self) -> None:
        """Called by Serve, for the first time at the end of the start; it replaces a replica whose check raises.

        An engine whose thread is stuck won't come loose, and holds every request: they are ended here.
        """
        self._has_started = True
        stalled_s = self._service.stalled_s
        if self._service.failure is None and stalled_s > self._config.serving.stuck_timeout_s:
            error = EngineStoppedError(
                f"the engine has been stuck for {stalled_s:.0f} s and is being restarted; where steps do take longer, "
                "raise serving.stuck_timeout_s"
            )
            log.error("%s", error)
            self._service.give_up(error)
        if self._service.failure is not None:
            raise EngineStoppedError(f"the engine has failed: {self._service.failure}")

    def close(self) -> None:
        """End the engine and let go of the workers. A second call does nothing."""
        session, self._session = getattr(self, "_session", None), None
        if session is not None:
            session.close()

    def __del__(self) -> None:
        """Called by Serve when the replica shuts down."""
        self.close()


def _sampling(params: SamplingParams | Mapping[str, Any]) -> SamplingParams:
    if isinstance(params, SamplingParams):
        return params
    from raymoe.engine.service import sampling_params

    return sampling_params(params)
