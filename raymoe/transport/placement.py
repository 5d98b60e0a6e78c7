"""The placement actor's own socket, the engine's end of it, and the orders to workers that come of it."""

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import zmq

from raymoe.errors import FrameError
from raymoe.experts.call import expert_id
from raymoe.placement.prefetch import orders
from raymoe.placement.state import ClusterState
from raymoe.transport.client import WorkerClient
from raymoe.transport.door import AllowedClients, Door
from raymoe.transport.frames import (
    Buffer,
    Header,
    Kind,
    Limits,
    Message,
    pack_experts,
    pack_forecast,
    parse_experts,
    parse_forecast,
)
from raymoe.transport.server import SocketThread
from raymoe.transport.sockets import Endpoint, KeyPair, client_socket, server_socket
from raymoe.types import DeviceName

LOADED, EVICTED = 1.0, 0.0  # the "score" of a residency change says which way it went


OnForecast = Callable[[int, np.ndarray, np.ndarray], None]
"""Told of a forecast: layer, experts, and what each is worth. Called on the socket's thread."""


class PlacementServer:
    """Feeds residency into a ``ClusterState``, and hands forecasts on."""

    def __init__(
        self, state: ClusterState, address: str, limits: Limits, on_forecast: OnForecast | None = None
    ) -> None:
        self._state = state
        self._limits = limits
        self._on_forecast = on_forecast
        self._context = zmq.Context(io_threads=1)
        self.clients = AllowedClients()
        self._door = Door(self._context, self.clients)
        keys = KeyPair.create()
        socket, endpoint = server_socket(self._context, address, keys, limits)
        self.endpoint = Endpoint(data=endpoint, control=endpoint, public_key=keys.public)
        self._door.watch(socket)
        self._thread = SocketThread(socket, self._on_message, limits, "placement")

    @property
    def dropped(self) -> int:
        """Malformed and replayed messages so far."""
        return self._thread.dropped + self._door.replayed

    @property
    def refused(self) -> int:
        """Connections so far that were not let in, or were cut for a forged frame."""
        return self._door.refused

    def close(self) -> None:
        """Stop serving."""
        self._thread.close()
        self._door.close()
        self._context.term()

    def _on_message(self, header: Header, body: Sequence[Buffer]) -> Message | None:
        if header.kind is Kind.FORECAST:
            forecast = parse_forecast(header, body, self._limits)
            if self._on_forecast is not None:
                self._on_forecast(*forecast)
            return None
        if header.kind is not Kind.RESIDENCY:
            raise FrameError(f"{header.kind.name} does not belong on the placement socket")
        identifiers, directions, device = parse_experts(header, body, self._limits)
        pairs = list(zip(identifiers, directions, strict=True))
        self._state.apply_residency(
            DeviceName(device),
            [identifier for identifier, direction in pairs if direction == LOADED],
            [identifier for identifier, direction in pairs if direction == EVICTED],
        )
        return None


class OrderDesk:
    """Turns forecasts into prefetch orders to the workers whose experts they name. Any thread may use it.

    Attributes:
        keys: its own CURVE keys, which the workers must admit.
    """

    def __init__(self, state: ClusterState, limits: Limits) -> None:
        self.keys = KeyPair.create()
        self._state = state
        self._limits = limits
        self._lock = threading.Lock()
        self._endpoints: dict[DeviceName, Endpoint] = {}
        self._client: WorkerClient | None = None

    def connect(self, endpoints: Mapping[DeviceName, Endpoint]) -> None:
        """Send orders to these workers from now on, and to no others."""
        with self._lock:
            if endpoints == self._endpoints:
                return
            if self._client is not None:
                self._client.close()
            self._endpoints = dict(endpoints)
            self._client = WorkerClient(self._endpoints, self.keys, self._limits)

    def forecast(self, layer: int, experts: np.ndarray, worths: np.ndarray) -> None:
        """Order what a layer to come is expected to ask for. Never waits; a worker that does not keep up gets none."""
        with self._lock:
            if self._client is None:
                return
            split = orders(layer, experts, worths, self._state.primary, self._endpoints)
            for device, (mine, scores) in split.items():
                self._client.prefetch(device, [expert_id(layer, expert) for expert in mine], scores)

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None


class PlacementClient:
    """The engine's end. Never waits: where the placement actor does not keep up or is gone, news is dropped.

    Residency is only a hint to it; the workers hold the truth. Forecasts that are lost cost time, not correctness.
    Used by one thread, but for ``move``.
    """

    def __init__(self, endpoint: Endpoint, keys: KeyPair, limits: Limits) -> None:
        self._context = zmq.Context(io_threads=1)
        self._keys = keys
        self._limits = limits
        self._endpoint = self._connected_to = endpoint
        self._socket = self._connect(endpoint)
        self.dropped = 0

    def move(self, endpoint: Endpoint) -> None:
        """Talk to another endpoint from the next message on: the placement actor was restarted. From any thread."""
        self._endpoint = endpoint

    def publish(self, changes: dict[DeviceName, tuple[list[int], list[int]]]) -> None:
        """Tell which experts each device loaded and evicted."""
        for device, (loaded, evicted) in changes.items():
            directions = [LOADED] * len(loaded) + [EVICTED] * len(evicted)
            self._send(pack_experts(Kind.RESIDENCY, 0, [*loaded, *evicted], directions, str(device)))

    def forecast(self, layer: int, experts: np.ndarray, worths: np.ndarray) -> None:
        """Tell which experts a layer to come is expected to ask for, and what each is worth."""
        self._send(pack_forecast(layer, experts, worths))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
        self._context.term()

    def _connect(self, endpoint: Endpoint) -> zmq.Socket:
        return client_socket(self._context, endpoint.data, endpoint.public_key, self._keys, self._limits)

    def _send(self, message: Message) -> None:
        endpoint = self._endpoint
        if endpoint != self._connected_to:
            self._socket.close()
            self._socket, self._connected_to = self._connect(endpoint), endpoint
        try:
            self._socket.send_multipart(message, flags=zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
