"""The way between engine and shadow.

The shadow listens, the engine connects. Neither ever waits for the other: what does not fit into a queue is dropped,
for a forecast that is lost costs time, not correctness.
"""

from collections.abc import Callable

import zmq

from raymoe.errors import FrameError
from raymoe.transport.door import AllowedClients, Door
from raymoe.transport.frames import Limits, parse_header
from raymoe.transport.shadow_messages import (
    FromShadow,
    News,
    pack_from_shadow,
    pack_news,
    parse_from_shadow,
    parse_news,
)
from raymoe.transport.sockets import Endpoint, KeyPair, client_socket, server_socket


class ShadowServer:
    """The shadow's end. Used by one thread.

    Attributes:
        clients: keys that may connect.
        dropped: malformed messages, and answers for which there was no room.
    """

    def __init__(self, address: str, limits: Limits) -> None:
        self.clients = AllowedClients()
        self.dropped = 0
        self._limits = limits
        self._context = zmq.Context(io_threads=1)
        self._door = Door(self._context, self.clients)
        keys = KeyPair.create()
        self._socket, endpoint = server_socket(self._context, address, keys, limits)
        self.endpoint = Endpoint(data=endpoint, control=endpoint, public_key=keys.public)
        self._door.watch(self._socket)
        self._peer: bytes | None = None

    def receive(self, wait_s: float) -> News | None:
        """The next news, or None where there is none within ``wait_s``. Malformed ones are dropped and counted."""
        while self._socket.poll(int(wait_s * 1000)):
            sender, *frames = self._socket.recv_multipart(copy=False)
            self._peer = sender.bytes
            try:
                buffers = [frame.buffer for frame in frames]
                if not buffers:
                    raise FrameError("an empty message")
                return parse_news(parse_header(buffers[0], self._limits), buffers[1:], self._limits)
            except FrameError:
                self.dropped += 1
                wait_s = 0.0
        return None

    def send(self, told: FromShadow) -> None:
        """Tell the engine that spoke last."""
        if self._peer is None:
            return
        try:
            self._socket.send_multipart([self._peer, *pack_from_shadow(told)], flags=zmq.NOBLOCK)
        except zmq.ZMQError:  # it does not keep up, or is gone
            self.dropped += 1

    @property
    def refused(self) -> int:
        """Connections so far that were not let in, or were cut for a forged frame."""
        return self._door.refused

    @property
    def replayed(self) -> int:
        """Frames that came twice."""
        return self._door.replayed

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._door.close()
        self._context.term()


class ShadowClient:
    """The engine's end. Used by one thread, but for ``move``.

    Args:
        endpoint: where the shadow listens; None where there is none yet.
        workers: devices of the configuration, which plans count.

    Attributes:
        bytes_sent: of messages to the shadow.
        moves: how often the shadow was found in another place; its sequences must be begun again.
    """

    def __init__(self, endpoint: Endpoint | None, keys: KeyPair, limits: Limits, workers: int) -> None:
        self.bytes_sent = 0
        self.moves = 0
        self.dropped = 0
        self._keys = keys
        self._limits = limits
        self._workers = workers
        self._context = zmq.Context(io_threads=1)
        self._endpoint = endpoint
        self._connected_to: Endpoint | None = None
        self._socket: zmq.Socket | None = None
        self._connect()

    def move(self, endpoint: Endpoint | None) -> None:
        """Talk to another endpoint from the next message on; None is to nobody. From any thread."""
        self._endpoint = endpoint

    def tell(self, news: News) -> None:
        """Send news; dropped where the shadow is not there or does not keep up."""
        self._connect()
        if self._socket is None:
            return
        message = pack_news(news)
        try:
            self._socket.send_multipart(message, flags=zmq.NOBLOCK)
            self.bytes_sent += sum(len(memoryview(frame).cast("B")) for frame in message)
        except zmq.Again:
            self.dropped += 1

    def receive(self, on_told: Callable[[FromShadow], None]) -> None:
        """Hand on everything that has come, in order. Never waits."""
        self._connect()
        socket = self._socket
        while socket is not None:
            try:
                frames = socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                buffers = [frame.buffer for frame in frames]
                header = parse_header(buffers[0], self._limits)
                told = parse_from_shadow(header, buffers[1:], self._limits, self._workers)
            except FrameError:
                self.dropped += 1
                continue
            on_told(told)

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
        self._context.term()

    def _connect(self) -> None:
        endpoint = self._endpoint
        if endpoint == self._connected_to:
            return
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        if endpoint is not None:
            self._socket = client_socket(self._context, endpoint.data, endpoint.public_key, self._keys, self._limits)
            self.moves += 1
        self._connected_to = endpoint
