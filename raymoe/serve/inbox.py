"""From the engine's thread to an event loop, with one wake-up for all chunks that are ready together."""

import asyncio
import threading

from raymoe.engine.request import Chunk


class Inbox:
    """Chunks of one answer. One thread puts, one coroutine takes; never waits for its reader.

    Unbounded on purpose: an answer's length is bounded by max_tokens.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._items: list[Chunk | BaseException] = []
        self._ready = asyncio.Event()

    def put(self, item: Chunk | BaseException) -> None:
        """Add a chunk, or the error that ends the answer. From any thread."""
        with self._lock:
            self._items.append(item)
            first = len(self._items) == 1
        if first:
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self, deadline: float) -> list[Chunk | BaseException]:
        """Wait for something and take everything there is. Raises TimeoutError at ``deadline`` on the loop's clock."""
        async with asyncio.timeout_at(deadline):
            await self._ready.wait()
        with self._lock:
            items, self._items = self._items, []
        self._ready.clear()  # after the swap: what is put in between schedules a wake-up of its own
        return items
