"""A TCP proxy between sockets: everybody reaches the workers through it, and it can be slow, silent, cut, or wrong.

A worker binds its ``ports`` and advertises the proxy's, as one behind published ports of a container would. The proxy
knows bytes, not messages: the streams are encrypted, so that what it changes or leaves out breaks a connection.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any

from tests.chaos.schedule import Fault, Kind

CHUNK_BYTES = 1 << 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends a reset, as a host that has lost the connection does
CONTROL_TIMEOUT_S = 10.0


class Plane(StrEnum):
    """A worker's two sockets."""

    CALLS = "calls"
    ORDERS = "orders"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """How a link is.

    Attributes:
        delay_s: that every chunk waits.
        bytes_per_s: of one direction of a connection; None is no limit.
        stalled: planes on which no byte passes; connections stay.
        cut: connections are reset, and new ones too.
        corrupted, dropped: shares of chunks in which a byte is changed, and that are left out.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    stalled: tuple[Plane, ...] = ()
    cut: bool = False
    corrupted: float = 0.0
    dropped: float = 0.0


CLEAR = Condition()


def condition_of(fault: Fault) -> Condition | None:
    """What a fault makes of a link; None for those that are of no link."""
    strength = fault.strength
    match fault.kind:
        case Kind.SLOW_LINK:  # from a busy Wi-Fi to a bad mobile connection
            return Condition(delay_s=0.005 * 40**strength, bytes_per_s=1e7 / 20**strength)
        case Kind.STALL_LINK:
            return Condition(stalled=tuple(Plane))
        case Kind.STALL_CALLS:
            return Condition(stalled=(Plane.CALLS,))
        case Kind.CUT_LINK:
            return Condition(cut=True)
        case Kind.CORRUPT_LINK:
            return Condition(corrupted=0.02 + 0.5 * strength)
        case Kind.DROP_BYTES:
            return Condition(dropped=0.02 + 0.5 * strength)
    return None


def merged(conditions: Sequence[Condition]) -> Condition:
    """All of them at once; the clear one where there are none."""
    rates = [one.bytes_per_s for one in conditions if one.bytes_per_s is not None]
    return Condition(
        delay_s=max((one.delay_s for one in conditions), default=0.0),
        bytes_per_s=min(rates, default=None),
        stalled=tuple(plane for plane in Plane if any(plane in one.stalled for one in conditions)),
        cut=any(one.cut for one in conditions),
        corrupted=max((one.corrupted for one in conditions), default=0.0),
        dropped=max((one.dropped for one in conditions), default=0.0),
    )


class Link:
    """What leads to one worker: a listener for each plane. Used by the proxy's loop, but for ``condition``.

    Attributes:
        advertise: where the two planes are reached, each as "HOST:PORT".
        carried_bytes: in both directions.
        spoiled: chunks that were changed or left out.
    """

    def __init__(self, targets: tuple[int, int], seed: int) -> None:
        self.condition = CLEAR
        self.advertise = ("", "")
        self.carried_bytes = self.spoiled = 0
        self._targets = dict(zip(Plane, targets, strict=True))
        self._random = random.Random(seed)
        self._changed = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen on free ports of loopback."""
        for plane in Plane:
            self._servers.append(await asyncio.start_server(self._accept(plane), "127.0.0.1", 0))
        first, second = (f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in self._servers)
        self.advertise = (first, second)

    async def become(self, condition: Condition) -> None:
        """Be so from now on."""
        self.condition = condition
        self._changed.set()  # whoever waits looks again
        self._changed = asyncio.Event()
        if condition.cut:
            for writer in list(self._writers):
                reset(writer)

    async def close(self) -> None:
        """Stop listening, and end all connections."""
        for server in self._servers:
            server.close()
        await self.become(Condition(cut=True))

    def _accept(self, plane: Plane) -> Any:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self.condition.cut:
                reset(writer)
                return
            try:
                there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._targets[plane])
            except OSError:  # nobody listens there now: as if the worker itself had refused
                reset(writer)
                return
            ends = {writer, there_writer}
            self._writers |= ends
            try:
                await asyncio.gather(self._pump(plane, reader, there_writer), self._pump(plane, there_reader, writer))
            finally:
                self._writers -= ends

        return connected

    async def _pump(self, plane: Plane, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # either end has gone
            while chunk := await reader.read(CHUNK_BYTES):
                carried = await self._carry(plane, chunk)
                self.carried_bytes += len(carried)
                writer.write(carried)
                await writer.drain()
        reset(writer)

    async def _carry(self, plane: Plane, chunk: bytes) -> bytes:
        """What arrives of a chunk, once it may pass."""
        condition = self.condition
        wait_s = condition.delay_s + len(chunk) / (condition.bytes_per_s or float("inf"))
        if wait_s:
            await asyncio.sleep(wait_s)
        while plane in self.condition.stalled:
            await self._changed.wait()
        if self._random.random() < self.condition.dropped:
            self.spoiled += 1
            return b""
        if self._random.random() < self.condition.corrupted:
            self.spoiled += 1
            place = self._random.randrange(len(chunk))
            return chunk[:place] + bytes([chunk[place] ^ self._random.randint(1, 255)]) + chunk[place + 1 :]
        return chunk


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection at once, with a reset."""
    raw = writer.get_extra_info("socket")
    if raw is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


class Proxy:
    """Links by device, run by a thread of their own while this is entered.

    Args:
        targets: ports that each worker binds, for calls and for orders.
    """

    def __init__(self, targets: dict[str, tuple[int, int]], seed: int = 0) -> None:
        self.links: dict[str, Link] = {}
        self._targets = targets
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        for number, (device, ports) in enumerate(self._targets.items()):
            self.links[device] = Link(ports, self._seed + number)
            self._do(self.links[device].open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in self.links.values():
            self._do(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONTROL_TIMEOUT_S)

    def become(self, device: str, condition: Condition) -> None:
        """Let a device's link be so from now on. From any thread."""
        self._do(self.links[device].become(condition))

    def _do(self, work: Awaitable[None]) -> None:
        async def done() -> None:
            await work

        asyncio.run_coroutine_threadsafe(done(), self._loop).result(CONTROL_TIMEOUT_S)
