"""The engine as the ingress sees it: a Serve handle with our own errors, timeouts and cancellation."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from ray.serve.handle import DeploymentHandle

from raymoe.engine.request import SamplingParams
from raymoe.errors import EngineStoppedError, OverloadedError
from raymoe.serve.batch import Batch
from raymoe.serve.errors import RequestTimeoutError, unwrap
from raymoe.serve.refusals import Refusals

if TYPE_CHECKING:
    from raymoe.engine.prompts import Prompt
    from raymoe.observe.stats import ClusterStats

ACCEPT_TIMEOUT_S = 15.0  # to reach the engine and encode the prompt; an engine that restarts takes longer
CARD_TIMEOUT_S = 2.0  # the engine answers within milliseconds; health probes usually wait hardly longer
STATS_TIMEOUT_S = 20.0  # the engine asks every worker, and waits 15 s for one that is silent
LATE_S = 5.0  # the engine ends late requests itself; this is for one that no longer does


class EngineClient:
    """Calls the engine deployment. Every error it raises is a RaymoeError, or a bug."""

    def __init__(self, handle: DeploymentHandle, request_timeout_s: float) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._timeout_s = request_timeout_s + LATE_S
        self._refusals = Refusals(time.monotonic)

    async def stream(self, prompt: "Prompt", params: SamplingParams | Mapping[str, Any]) -> AsyncGenerator[Batch]:
        """The batches of an answer; see ``EngineServer.stream``. Closing the generator cancels the request.

        Raises EngineStoppedError where the engine can't be reached or ends, beside the engine's own errors; and
        OverloadedError without asking it where it has refused another one a moment ago.
        """
        priority = params.get("priority", 0) if isinstance(params, Mapping) else params.priority
        self._refusals.check(priority)
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeout_s
        response = self._streaming.stream.remote(prompt, params)
        finished = False
        try:
            await _next(response, clock() + ACCEPT_TIMEOUT_S, EngineStoppedError(_unreachable(ACCEPT_TIMEOUT_S)))
            late = RequestTimeoutError(f"the request took longer than {self._timeout_s:g} s and was ended")
            while not finished:
                batch = await _next(response, deadline, late)
                finished = batch.last is not None
                yield batch
        except OverloadedError as error:
            self._refusals.note(error, priority)
            finished = True
            raise
        finally:
            if not finished:
                response.cancel()

    async def card(self) -> dict[str, Any]:
        """The served model. Raises EngineStoppedError where generation does not work now."""
        return await self._call("card", CARD_TIMEOUT_S)

    async def stats(self, names: bool = False) -> "ClusterStats":
        """Devices and engine; with ``names`` also those of the resident experts."""
        return await self._call("stats", STATS_TIMEOUT_S, names)

    async def drain(self, limit_s: float) -> int:
        """See ``EngineServer.drain``."""
        return await self._call("drain", limit_s + LATE_S, limit_s)

    async def tokenize(self, prompt: "Prompt") -> list[int]:
        """Token ids of a prompt."""
        return await self._call("tokenize", ACCEPT_TIMEOUT_S, prompt)

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of token ids."""
        return await self._call("detokenize", ACCEPT_TIMEOUT_S, token_ids)

    async def settings(self) -> dict[str, Any]:
        """The settings of scheduling in force."""
        return await self._call("settings", ACCEPT_TIMEOUT_S)

    async def change_settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Change some settings; returns all."""
        return await self._call("change_settings", STATS_TIMEOUT_S, changes)

    async def residency(self) -> dict[str, Any]:
        """Where every expert is."""
        return await self._call("residency", STATS_TIMEOUT_S)

    async def timeline(self) -> dict[str, Any]:
        """The last few decode steps."""
        return await self._call("timeline", STATS_TIMEOUT_S)

    async def _call(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        response = getattr(self._handle, method).remote(*arguments)
        try:
            return await asyncio.wait_for(_own_errors(response), timeout_s)
        except TimeoutError as error:
            response.cancel()
            raise EngineStoppedError(_unreachable(timeout_s)) from error


async def _next(response: Any, deadline: float, late: Exception) -> Batch:
    """The next batch. Raises ``late`` at the deadline."""
    try:
        async with asyncio.timeout_at(deadline):
            return await response.__anext__()
    except TimeoutError as error:
        raise late from error
    except StopAsyncIteration:
        raise EngineStoppedError("the engine ended in the middle of the answer") from None
    except Exception as error:
        raise unwrap(error) from None


async def _own_errors(response: Any) -> Any:
    try:
        return await response
    except Exception as error:
        raise unwrap(error) from None


def _unreachable(timeout_s: float) -> str:
    return f"the engine did not answer within {timeout_s:g} s; it is starting or restarting, try again later"
