"""Heartbeats to all workers from one thread, which waits for none of them because of another."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

import torch
import zmq

from raymoe.errors import FrameError
from raymoe.placement.health import DOWN_S, PING_S, SUSPECT_S
from raymoe.transport.frames import Header, Kind, Limits, parse_header
from raymoe.transport.sockets import Endpoint, KeyPair, client_socket
from raymoe.types import DeviceName

log = logging.getLogger(__name__)

REOPEN_S = 2 * DOWN_S  # without an answer: a connection that was cut retries ever more rarely, a new one does at once
POLL_MS = 50


class Line:
    """The connection to one worker process.

    Attributes:
        incarnation: the process.
        heard_s: when it was opened, or last answered.
    """

    def __init__(self, incarnation: str, endpoint: Endpoint, socket: zmq.Socket, now_s: float) -> None:
        self.incarnation = incarnation
        self.endpoint = endpoint
        self.socket = socket
        self.heard_s = now_s
        self._sent_s: dict[int, float] = {}  # of heartbeats that may still be answered in time

    def ping(self, request: int, now_s: float) -> None:
        """Send one heartbeat, unless the queue is full of unanswered ones."""
        self._sent_s = {number: sent_s for number, sent_s in self._sent_s.items() if now_s - sent_s < SUSPECT_S}
        try:
            self.socket.send(Header(kind=Kind.PING, dtype=torch.float32, request=request).pack(), flags=zmq.NOBLOCK)
        except zmq.Again:
            return
        self._sent_s[request] = now_s

    def pong(self, limits: Limits, now_s: float) -> bool:
        """Take one answer; whether it is one to a heartbeat of this moment. Older ones say nothing of now."""
        try:
            request = parse_header(self.socket.recv_multipart(flags=zmq.NOBLOCK)[0], limits).request
        except (zmq.Again, FrameError):
            return False
        sent_s = self._sent_s.pop(request, None)
        if sent_s is None or now_s - sent_s > SUSPECT_S:
            return False
        self.heard_s = now_s
        return True


class Heartbeats:
    """Asks every worker again and again whether it is there.

    Args:
        keys: with which it asks; the workers must admit them.
        on_pong: told of each answer: device, incarnation, time. On this thread.
        on_round: told of the time whenever all were asked.
    """

    def __init__(
        self,
        keys: KeyPair,
        limits: Limits,
        on_pong: Callable[[DeviceName, str, float], None],
        on_round: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._on_pong = on_pong
        self._on_round = on_round
        self._clock = clock
        self._context = zmq.Context(io_threads=1)
        self._poller = zmq.Poller()
        self._wanted: dict[DeviceName, tuple[str, Endpoint]] = {}
        self._lines: dict[DeviceName, Line] = {}
        self._request = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def watch(self, workers: Mapping[DeviceName, tuple[str, Endpoint]]) -> None:
        """Ask these from now on: each one's incarnation, and where it listens. From any thread; does not wait."""
        self._wanted = dict(workers)

    def close(self) -> None:
        """Ask nobody any more."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        next_s = self._clock()
        while not self._stop.is_set():
            now_s = self._clock()
            if now_s >= next_s:
                next_s = now_s + PING_S
                self._connect(now_s)
                for line in self._lines.values():
                    self._request += 1
                    line.ping(self._request, now_s)
                self._on_round(now_s)
            self._listen(min(POLL_MS, max(1, int((next_s - self._clock()) * 1000))))
        for line in self._lines.values():
            line.socket.close()
        self._context.term()

    def _listen(self, wait_ms: int) -> None:
        ready = dict(self._poller.poll(wait_ms))
        for device, line in self._lines.items():
            if line.socket in ready and line.pong(self._limits, self._clock()):
                self._on_pong(device, line.incarnation, self._clock())

    def _connect(self, now_s: float) -> None:
        wanted = self._wanted
        for device, line in list(self._lines.items()):
            if wanted.get(device) != (line.incarnation, line.endpoint) or now_s - line.heard_s > REOPEN_S:
                self._poller.unregister(line.socket)
                line.socket.close()
                del self._lines[device]
        for device, (incarnation, endpoint) in wanted.items():
            if device not in self._lines:
                socket = client_socket(self._context, endpoint.control, endpoint.public_key, self._keys, self._limits)
                self._poller.register(socket, zmq.POLLIN)
                self._lines[device] = Line(incarnation, endpoint, socket, now_s)
