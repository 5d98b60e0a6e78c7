"""Answers that many ask for at once: asked of the engine once, and kept for a moment."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Shared(Generic[Answer]):
    """Whoever asks while an answer is under way, or is fresh, gets the same one. Errors are not kept.

    However many pages are open, the engine is asked once per ``keep_s``. Used in one event loop.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[Answer]], keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._keep_s = keep_s
        self._clock = clock
        self._under_way: asyncio.Task[Answer] | None = None
        self._kept: tuple[float, Answer] | None = None

    async def get(self) -> Answer:
        """The answer. Raises what asking raises; a caller who gives up takes it from nobody else."""
        if self._kept is not None and self._clock() - self._kept[0] < self._keep_s:
            return self._kept[1]
        if self._under_way is None:
            self._under_way = asyncio.ensure_future(self._fetch())
            self._under_way.add_done_callback(self._ended)
        return await asyncio.shield(self._under_way)

    def forget(self) -> None:
        """What is kept is no longer true: the next one asks."""
        self._kept = None

    async def _fetch(self) -> Answer:
        answer = await self._ask()
        self._kept = (self._clock(), answer)
        return answer

    def _ended(self, task: "asyncio.Task[Answer]") -> None:
        self._under_way = None
        if not task.cancelled():
            task.exception()  # whoever waits has it; where nobody does any more, it is no one's loss
