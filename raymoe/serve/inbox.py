"""From the engine's thread to an event loop, with one wake-up for all chunks that are ready together."""

import asyncio
import threading

from raymoe.engine.request import Chunk


class Bell:
    """Wakes coroutines of the loop that it is made on: one call wakes all for whom it rang meanwhile.

    A step of several requests ends with a chunk for each; a call for each would interrupt the next step as often.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._rung: list[asyncio.Event] = []

    def ring(self, event: asyncio.Event) -> None:
        """Set an event on the loop, soon. From any thread."""
        with self._lock:
            self._rung.append(event)
            first = len(self._rung) == 1
        if first:
            self.loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        with self._lock:
            rung, self._rung = self._rung, []
        for event in rung:
            event.set()


class Inbox:
    """Chunks of one answer. One thread puts, one coroutine takes; never waits for its reader.

    Unbounded on purpose: an answer's length is bounded by max_tokens.

    Args:
        bell: shared with other inboxes of this loop; omitted: it has its own.
    """

    def __init__(self, bell: Bell | None = None) -> None:
        self._bell = bell or Bell()
        self._lock = threading.Lock()
        self._items: list[Chunk | BaseException] = []
        self._ready = asyncio.Event()

    def put(self, item: Chunk | BaseException) -> None:
        """Add a chunk, or the error that ends the answer. From any thread."""
        with self._lock:
            self._items.append(item)
            first = len(self._items) == 1
        if first:
            self._bell.ring(self._ready)

    async def take(self, deadline: float) -> list[Chunk | BaseException]:
        """Wait for something and take everything there is. Raises TimeoutError at ``deadline`` on the loop's clock."""
        async with asyncio.timeout_at(deadline):
            await self._ready.wait()
        with self._lock:
            items, self._items = self._items, []
        self._ready.clear()  # after the swap: what is put in between schedules a wake-up of its own
        return items
