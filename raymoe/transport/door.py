"""Who may connect to the server sockets of one ZeroMQ context, and how many could not.

Only keys that were told here get in; whoever has none, or speaks another protocol, is cut off within the handshake, so
that no byte of theirs reaches a parser. Within a connection CURVE numbers every frame: one that comes twice, or was
forged, costs the connection. None of that is told to the other side; here it is counted, but for what is not even
ZeroMQ, of which the library tells nothing.
"""

import logging
import threading

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from raymoe.transport.sockets import DOMAIN

log = logging.getLogger(__name__)

REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
WATCHED = REFUSALS | zmq.EVENT_MONITOR_STOPPED
STOP_TIMEOUT_S = 5.0  # of a thread that only counts: its sockets are closed already


class AllowedClients:
    """Answers ZeroMQ's question whether a client key may connect."""

    def __init__(self, keys: set[bytes] | None = None) -> None:
        self.keys = set(keys or ())

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator with the client's public key."""
        return key in self.keys


class Door:
    """Vets clients of every server socket in ``context``, and counts those that were refused at the watched ones.

    Attributes:
        clients: keys that may connect.
        refused: connections that were refused or cut: an unknown key, none, another protocol, a forged frame.
        replayed: frames that came twice.
    """

    def __init__(self, context: zmq.Context, clients: AllowedClients) -> None:
        self.clients = clients
        self.refused = 0
        self.replayed = 0
        self._context = context
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=DOMAIN.decode(), credentials_provider=clients)
        self._counter: threading.Thread | None = None

    def watch(self, *sockets: zmq.Socket) -> None:
        """Count refusals at bound sockets until they are closed. To be called once."""
        monitors = []
        for number, socket in enumerate(sockets):
            address = f"inproc://door-{number}"
            socket.monitor(address, WATCHED)
            monitor = self._context.socket(zmq.PAIR)
            monitor.connect(address)
            monitors.append(monitor)
        # a thread of its own: the sender of these events is ZeroMQ's I/O thread, which waits where nobody reads them
        self._counter = threading.Thread(target=self._count, args=(monitors,), name="door", daemon=True)
        self._counter.start()

    def close(self) -> None:
        """Stop. The sockets must be closed before."""
        if self._counter is not None:
            self._counter.join(timeout=STOP_TIMEOUT_S)
        self._authenticator.stop()

    def _count(self, monitors: list[zmq.Socket]) -> None:
        poller = zmq.Poller()
        for monitor in monitors:
            poller.register(monitor, zmq.POLLIN)
        while poller.sockets:
            for monitor, _ in poller.poll():
                event = parse_monitor_message(monitor.recv_multipart())
                if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                    poller.unregister(monitor)
                    monitor.close(linger=0)
                else:
                    self._note(event["value"])

    def _note(self, reason: int) -> None:
        if reason == zmq.PROTOCOL_ERROR_ZMTP_INVALID_SEQUENCE:
            self.replayed += 1
        else:
            self.refused += 1
        count = self.refused + self.replayed
        if worth_telling(count):
            log.warning("cut %d connections so far: unknown keys, other protocols, forged or replayed frames", count)


def worth_telling(count: int) -> bool:
    """Whether the ``count``-th time is worth a line in a log where others decide how often it happens."""
    return count & (count - 1) == 0  # 1, 2, 4, 8, …
