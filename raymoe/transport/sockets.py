"""How sockets are made: bounded, encrypted, on one named address.

Keys are CURVE pairs. A server admits only the client keys it was told (``door``); they travel through Ray's actor
calls, never over these sockets, and are never logged.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from raymoe.transport.frames import HEADER, Limits

HIGH_WATER_MARK = 64  # messages: several layers' worth; a full queue is an error, not a place to wait
LINGER_MS = 0
HANDSHAKE_MS = 5000  # two round trips; whoever is not in by then is cut off, so that silent connections do not pile up
BACKLOG = 64  # connections that the kernel holds until they are accepted: more than a cluster has at once
DOMAIN = b"raymoe"  # a name for the authenticator; without one, ZeroMQ lets everybody in where none answers
# of a host that vanished without a word: its connection is closed after KEEPALIVE_IDLE_S + 3 x KEEPALIVE_EVERY_S, and
# so is one whose peer has acknowledged nothing for as long
KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S, KEEPALIVE_COUNT = 10, 5, 3
# A stream with a wrong byte in a frame's length, or whose other end vanished, does not end by itself (TCP gives up
# after some 15 minutes). ZeroMQ's own heartbeats end it, and it is made anew. Its own threads answer them.
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 2000
REDIAL_S = 1.0  # a handshake takes milliseconds on a network, and some tenths of a second on a busy small machine


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair in Z85. ``repr`` hides the secret."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def create(cls) -> "KeyPair":
        """A fresh pair."""
        return cls(*zmq.curve_keypair())


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a worker listens: its data and control addresses, and its public key."""

    data: str
    control: str
    public_key: bytes


def server_socket(
    context: zmq.Context, address: str, keys: KeyPair, limits: Limits, port: int | None = None
) -> tuple[zmq.Socket, str]:
    """A ROUTER bound to ``port`` of ``address``, or to a free one; returns it and its endpoint.

    It admits nobody before ``context`` has a ``Door``. Raises OSError where that can't be bound.
    """
    socket = context.socket(zmq.ROUTER)
    _bound(socket, limits)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.curve_server = True
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    try:
        if port is None:
            port = socket.bind_to_random_port(f"tcp://{bracketed(address)}")
        else:
            socket.bind(f"tcp://{bracketed(address)}:{port}")
    except zmq.ZMQBaseError as error:
        socket.close()
        raise OSError(f"{address}, {f'port {port}' if port else 'any port'}: {error}") from error
    return socket, f"tcp://{bracketed(address)}:{port}"


def client_socket(context: zmq.Context, endpoint: str, server_key: bytes, keys: KeyPair, limits: Limits) -> zmq.Socket:
    """A DEALER connected to ``endpoint``."""
    socket = unconnected_socket(context, server_key, keys, limits)
    socket.connect(endpoint)
    return socket


def unconnected_socket(context: zmq.Context, server_key: bytes, keys: KeyPair, limits: Limits) -> zmq.Socket:
    """A DEALER for a server with this key, to be watched before it connects."""
    socket = context.socket(zmq.DEALER)
    _bound(socket, limits)
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.heartbeat_ttl = 2 * HEARTBEAT_TIMEOUT_MS  # the other end gives up as well
    socket.curve_serverkey = server_key
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    return socket


class Redial:
    """Connects sockets anew that take nothing more.

    Where what arrives can't be decrypted, libzmq gives a client's connection up for good: the socket then has nobody to
    send to, as one whose peer is long gone has a full queue. Either way what it holds is of no use to anybody.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._dialled_s: dict[zmq.Socket, float] = {}

    def refused(self, socket: zmq.Socket, endpoint: str) -> None:
        """A message was not taken: connect anew, at most once in ``REDIAL_S``."""
        now_s = self._clock()
        if now_s - self._dialled_s.get(socket, -math.inf) < REDIAL_S:
            return
        self._dialled_s[socket] = now_s
        with contextlib.suppress(zmq.ZMQError):  # libzmq has forgotten the endpoint
            socket.disconnect(endpoint)
        socket.connect(endpoint)

    def forget(self, socket: zmq.Socket) -> None:
        """It is closed."""
        self._dialled_s.pop(socket, None)


def bracketed(address: str) -> str:
    """An IPv6 address in brackets, others as they are."""
    return f"[{address}]" if ":" in address else address


def _bound(socket: zmq.Socket, limits: Limits) -> None:
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.body_bytes + HEADER.size)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_EVERY_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_COUNT)
    socket.setsockopt(zmq.TCP_MAXRT, 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_COUNT * KEEPALIVE_EVERY_S))
