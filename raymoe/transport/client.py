"""The engine's side of the data plane: send a layer to several workers, gather their answers by a deadline."""

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping

import torch
import zmq

from raymoe.errors import ExpertUnavailableError
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
from raymoe.transport.sockets import Endpoint, KeyPair, client_socket
from raymoe.types import DeviceName

LISTEN_MS = 1  # how long answers are waited for at a time where something else is to be heard meanwhile


class WorkerClient:
    """Connections to all remote workers. Used by one thread.

    Args:
        spin_s: how long to look for an answer without sleeping. Waking up costs more than a short spin, but on
            a machine whose cores the workers need, spinning takes them away; 0 never spins.

    Attributes:
        late_answers: to requests that nobody waits for any more.
        while_waiting: done again and again while answers are waited for; None is nothing.
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
        self._limits = limits
        self._spin_s = spin_s
        self._requests = itertools.count(1)
        self._poller = zmq.Poller()
        self._data: dict[DeviceName, zmq.Socket] = {}
        self._control: dict[DeviceName, zmq.Socket] = {}
        self._name_of: dict[zmq.Socket, DeviceName] = {}
        self.late_answers = 0
        self.while_waiting: Callable[[], None] | None = None
        for device, endpoint in endpoints.items():
            data = client_socket(self._context, endpoint.data, endpoint.public_key, keys, limits)
            self._data[device] = data
            self._name_of[data] = device
            self._poller.register(data, zmq.POLLIN)
            self._control[device] = client_socket(self._context, endpoint.control, endpoint.public_key, keys, limits)

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        """Send one call; returns its request number. Raises ExpertUnavailableError where the queue is full."""
        request = next(self._requests)
        try:
            self._data[device].send_multipart(pack_call(request, call), flags=zmq.NOBLOCK, copy=True)
        except zmq.Again as error:
            raise ExpertUnavailableError(
                f'worker "{device}" takes no calls: it refuses the connection or its queue is full'
            ) from error
        return request

    def gather(
        self, requests: dict[int, DeviceName], timeout_s: float, arrived_s: dict[int, float] | None = None
    ) -> dict[int, ExpertAnswer]:
        """Wait for the answers to ``requests``. A late answer to an older request is dropped and counted.

        Raises ExpertUnavailableError where a worker fails, or does not answer in time.

        Args:
            arrived_s: takes the monotonic time at which each answer came.
        """
        answers: dict[int, ExpertAnswer] = {}
        deadline = time.monotonic() + timeout_s
        spin_until = time.monotonic() + self._spin_s if self._spin_s else 0.0
        while len(answers) < len(requests):
            now = time.monotonic()
            if now > deadline:
                late = sorted({requests[request] for request in requests if request not in answers})
                raise ExpertUnavailableError(
                    f"no answer from worker {', '.join(late)} within {timeout_s:g} s; is its node up and reachable?"
                )
            wait_ms = 0 if now < spin_until else max(1, int((deadline - now) * 1000))
            if self.while_waiting is not None:
                self.while_waiting()
                wait_ms = min(wait_ms, LISTEN_MS)
            for socket, _ in self._poller.poll(wait_ms):
                request = self._receive(socket, requests, answers)
                if arrived_s is not None and request is not None:
                    arrived_s[request] = time.monotonic()
        return answers

    def _receive(
        self, socket: zmq.Socket, requests: dict[int, DeviceName], answers: dict[int, ExpertAnswer]
    ) -> int | None:
        frames = [frame.buffer for frame in socket.recv_multipart(copy=False)]
        header = parse_header(frames[0], self._limits)
        if header.request not in requests or header.request in answers:
            self.late_answers += 1
            return None
        if header.kind is Kind.ERROR:
            raise ExpertUnavailableError(
                f'worker "{self._name_of[socket]}": {parse_text(header, frames[1:], self._limits)}'
            )
        answers[header.request] = parse_answer(header, frames[1:], self._limits)
        return header.request

    def ping(self, device: DeviceName, timeout_s: float) -> float | None:
        """Round trip of a heartbeat in seconds, or None without an answer in time."""
        socket = self._control[device]
        request = next(self._requests)
        start = time.monotonic()
        try:
            socket.send(Header(kind=Kind.PING, dtype=torch.float32, request=request).pack(), flags=zmq.NOBLOCK)
        except zmq.Again:  # not connected, or a queue full of unanswered ones
            return None
        while (left := start + timeout_s - time.monotonic()) > 0:
            if not socket.poll(int(left * 1000) + 1):
                continue
            if parse_header(socket.recv_multipart()[0], self._limits).request == request:
                return time.monotonic() - start
        return None

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
        with contextlib.suppress(zmq.Again):  # its queue is full
            self._control[device].send_multipart(message, flags=zmq.NOBLOCK)

    def close(self) -> None:
        """Close all connections; what is in flight is dropped."""
        for socket in (*self._data.values(), *self._control.values()):
            socket.close()
        self._context.term()
