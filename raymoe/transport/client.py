"""The engine's side of the data plane: calls to several workers and their answers as they come, and signs of life."""

import itertools
import logging
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
import zmq

from raymoe.errors import ExpertUnavailableError, FrameError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder
from raymoe.transport.frames import (
    Header,
    Kind,
    Limits,
    Message,
    pack_call,
    pack_experts,
    pack_forget,
    pack_order,
    parse_answer,
    parse_header,
    parse_text,
)
from raymoe.transport.sockets import Endpoint, KeyPair, Redial, client_socket, unconnected_socket
from raymoe.types import DeviceName

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What came of a request: an answer, or the worker's error in words."""

    request: int
    answer: ExpertAnswer | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Connection:
    """To one worker: calls, control messages, and what ZeroMQ tells of the first."""

    endpoint: Endpoint
    data: zmq.Socket
    control: zmq.Socket
    monitor: zmq.Socket

    def close(self) -> None:
        self.data.disable_monitor()
        for socket in (self.monitor, self.data, self.control):
            socket.close()


class WorkerClient:
    """Connections to all remote workers. Used by one thread.

    Args:
        spin_s: how long to look for an answer without sleeping. Waking up costs more than a short spin, but on
            a machine whose cores the workers need, spinning takes them away; 0 never spins.

    Attributes:
        late_answers: to requests that nobody waits for any more.
        malformed: answers that were no well-formed messages, and dropped.
    """

    def __init__(
        self,
        endpoints: Mapping[DeviceName, Endpoint],
        keys: KeyPair,
        limits: Limits,
        *,
        spin_s: float = 0.0,
    ) -> None:
        self._context = zmq.Context(io_threads=1)
        self._keys = keys
        self._limits = limits
        self._spin_s = spin_s
        self._requests = itertools.count(1)
        self._answers = zmq.Poller()
        self._signs = zmq.Poller()
        self._connections: dict[DeviceName, _Connection] = {}
        self._name_of: dict[zmq.Socket, DeviceName] = {}
        self._redial = Redial()
        self.late_answers = 0
        self.malformed = 0
        self.connect(endpoints)

    def connect(self, endpoints: Mapping[DeviceName, Endpoint]) -> set[DeviceName]:
        """Talk to these from now on, and to no others. Returns those whose connection is another one now, or gone.

        What was under way on such a connection is lost.
        """
        moved = {name for name, known in self._connections.items() if endpoints.get(name) != known.endpoint}
        for name in moved:
            self._disconnect(name)
        for name, endpoint in endpoints.items():
            if name not in self._connections:
                self._connect(name, endpoint)
        return moved

    def _connect(self, name: DeviceName, endpoint: Endpoint) -> None:
        data = unconnected_socket(self._context, endpoint.public_key, self._keys, self._limits)
        monitor = data.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        data.connect(endpoint.data)
        control = client_socket(self._context, endpoint.control, endpoint.public_key, self._keys, self._limits)
        self._connections[name] = _Connection(endpoint, data, control, monitor)
        self._answers.register(data, zmq.POLLIN)
        for socket in (control, monitor):
            self._signs.register(socket, zmq.POLLIN)
        self._name_of |= dict.fromkeys((data, control, monitor), name)

    def _disconnect(self, name: DeviceName) -> None:
        connection = self._connections.pop(name)
        self._answers.unregister(connection.data)
        for socket in (connection.control, connection.monitor):
            self._signs.unregister(socket)
        for socket in (connection.data, connection.control, connection.monitor):
            del self._name_of[socket]
            self._redial.forget(socket)
        connection.close()

    # --- calls --------------------------------------------------------------------------------------------

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        """Send one call; returns its request number. Raises ExpertUnavailableError where the queue is full."""
        connection = self._connections.get(device)
        if connection is None:
            raise ExpertUnavailableError(f'worker "{device}" is not connected')
        request = next(self._requests)
        try:
            connection.data.send_multipart(pack_call(request, call), flags=zmq.NOBLOCK, copy=True)
        except zmq.Again as error:
            self._redial.refused(connection.data, connection.endpoint.data)
            raise ExpertUnavailableError(
                f'worker "{device}" takes no calls: it refuses the connection or its queue is full'
            ) from error
        return request

    def receive(self, wait_s: float, awaited: Container[int]) -> list[Received]:
        """Wait for whatever comes first, at most so long.

        An answer to a request that is not ``awaited`` any more is dropped and counted, and so is what is malformed.
        """
        spin_until = time.monotonic() + min(wait_s, self._spin_s) if self._spin_s else 0.0
        ready = self._answers.poll(0) if self._spin_s else []
        while not ready and self._spin_s and time.monotonic() < spin_until:
            ready = self._answers.poll(0)
        if not ready:
            ready = self._answers.poll(max(1, int(wait_s * 1000)))
        received = (self._receive(socket, awaited) for socket, _ in ready)
        return [each for each in received if each is not None]

    def _receive(self, socket: zmq.Socket, awaited: Container[int]) -> Received | None:
        frames = [frame.buffer for frame in socket.recv_multipart(copy=False)]
        try:
            header = parse_header(frames[0], self._limits)
            if header.request not in awaited:
                self.late_answers += 1
                return None
            if header.kind is Kind.ERROR:
                return Received(request=header.request, error=parse_text(header, frames[1:], self._limits))
            return Received(request=header.request, answer=parse_answer(header, frames[1:], self._limits))
        except FrameError as error:
            self.malformed += 1
            log.warning('worker "%s": dropped a malformed answer: %s', self._name_of[socket], error)
            return None

    # --- signs of life --------------------------------------------------------------------------------------

    def probe(self, device: DeviceName) -> None:
        """Ask whether a worker lives; ``signs`` tells of its answer. Never waits."""
        self._tell(device, [Header(kind=Kind.PING, dtype=torch.float32, request=next(self._requests)).pack()])

    def signs(self) -> tuple[set[DeviceName], set[DeviceName]]:
        """Who has answered pings, and whose connection has closed, since the last time; never waits."""
        answered: set[DeviceName] = set()
        closed: set[DeviceName] = set()
        while ready := self._signs.poll(0):
            for socket, _ in ready:
                name = self._name_of[socket]
                frames = socket.recv_multipart()
                if socket is self._connections[name].monitor:
                    closed.add(name)
                elif self._is_pong(name, frames):
                    answered.add(name)
        return answered, closed

    def _is_pong(self, name: DeviceName, frames: list[bytes]) -> bool:
        try:
            return parse_header(frames[0], self._limits).kind is Kind.PONG
        except FrameError as error:
            self.malformed += 1
            log.warning('worker "%s": dropped a malformed answer: %s', name, error)
            return False

    def ping(self, device: DeviceName, timeout_s: float) -> float | None:
        """Round trip of a ping in seconds, or None without an answer in time."""
        start_s = time.monotonic()
        self.probe(device)
        while (left_s := start_s + timeout_s - time.monotonic()) > 0:
            if self._signs.poll(int(left_s * 1000) + 1) and device in self.signs()[0]:
                return time.monotonic() - start_s
        return None

    # --- orders ---------------------------------------------------------------------------------------------

    def prefetch(self, device: DeviceName, identifiers: list[int], scores: list[float]) -> None:
        """Order loads ahead of need. Fire and forget: the worker may refuse, and a full queue drops the order."""
        self._tell(device, pack_experts(Kind.PREFETCH, next(self._requests), identifiers, scores))

    def order(self, device: DeviceName, order: LoadOrder) -> None:
        """Order loads for a step to come. Fire and forget, like ``prefetch``."""
        self._tell(device, pack_order(order))

    def forget(self, device: DeviceName, sequence: int) -> None:
        """Tell a worker that a sequence has ended, so that nothing is held for it. Fire and forget."""
        self._tell(device, pack_forget(sequence))

    def _tell(self, device: DeviceName, message: Message) -> None:
        connection = self._connections.get(device)
        if connection is not None:
            try:
                connection.control.send_multipart(message, flags=zmq.NOBLOCK)
            except zmq.Again:
                self._redial.refused(connection.control, connection.endpoint.control)

    def close(self) -> None:
        """Close all connections; what is in flight is dropped."""
        self.connect({})
        self._context.term()
