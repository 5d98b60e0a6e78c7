"""The placement actor's own socket, and the engine's end of it: residency, forecasts and scores per step."""

from collections.abc import Sequence

import zmq

from raymoe.errors import FrameError
from raymoe.placement.state import ClusterState
from raymoe.transport.frames import Buffer, Header, Kind, Limits, Message, pack_experts, parse_experts
from raymoe.transport.server import SocketThread
from raymoe.transport.sockets import AllowedClients, Endpoint, KeyPair, authenticator, client_socket, server_socket
from raymoe.types import DeviceName

LOADED, EVICTED = 1.0, 0.0  # the "score" of a residency change says which way it went


class PlacementServer:
    """Feeds messages into a ``ClusterState``."""

    def __init__(self, state: ClusterState, address: str, limits: Limits) -> None:
        self._state = state
        self._limits = limits
        self._context = zmq.Context(io_threads=1)
        self.clients = AllowedClients()
        self._authenticator = authenticator(self._context, self.clients)
        keys = KeyPair.create()
        socket, endpoint = server_socket(self._context, address, keys, limits)
        self.endpoint = Endpoint(data=endpoint, control=endpoint, public_key=keys.public)
        self._thread = SocketThread(socket, self._on_message, limits, "placement")

    def close(self) -> None:
        """Stop serving."""
        self._thread.close()
        self._authenticator.stop()
        self._context.term()

    def _on_message(self, header: Header, body: Sequence[Buffer]) -> Message | None:
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


class PlacementClient:
    """The engine's end. Never waits: where the placement actor does not keep up, news is dropped.

    Residency is only a hint to it; the workers hold the truth.
    """

    def __init__(self, endpoint: Endpoint, keys: KeyPair, limits: Limits) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = client_socket(self._context, endpoint.data, endpoint.public_key, keys, limits)
        self.dropped = 0

    def publish(self, changes: dict[DeviceName, tuple[list[int], list[int]]]) -> None:
        """Tell which experts each device loaded and evicted."""
        for device, (loaded, evicted) in changes.items():
            directions = [LOADED] * len(loaded) + [EVICTED] * len(evicted)
            message = pack_experts(Kind.RESIDENCY, 0, [*loaded, *evicted], directions, str(device))
            try:
                self._socket.send_multipart(message, flags=zmq.NOBLOCK)
            except zmq.Again:
                self.dropped += 1

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
        self._context.term()
