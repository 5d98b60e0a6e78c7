"""The worker's side of the data plane: one socket for expert calls, one for heartbeats and orders.

Calls are computed on the data thread, one at a time. Heartbeats have a thread of their own, so that a long
computation is not mistaken for death.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import zmq

from raymoe.errors import FrameError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder, layer_and_expert
from raymoe.transport.door import AllowedClients, Door, worth_telling
from raymoe.transport.frames import (
    Buffer,
    Header,
    Kind,
    Limits,
    Message,
    pack_answer,
    pack_text,
    parse_call,
    parse_experts,
    parse_forget,
    parse_header,
    parse_order,
)
from raymoe.transport.sockets import Endpoint, KeyPair, server_socket

log = logging.getLogger(__name__)
POLL_MS = 200  # how often a quiet thread looks whether it should stop

Handler = Callable[[Header, Sequence[Buffer]], Message | None]


class Worker(Protocol):
    """Whoever computes the calls that arrive."""

    name: str

    @property
    def num_layers(self) -> int:
        """MoE layers of the model; calls for others are malformed."""
        ...

    def compute(self, call: ExpertCall) -> ExpertAnswer:
        """Compute a call."""
        ...

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """A forecast for a layer to come."""
        ...

    def order(self, order: LoadOrder) -> None:
        """Load experts for a call to come."""
        ...

    def forget(self, sequence: int) -> None:
        """A sequence has ended."""
        ...


class SocketThread:
    """A ROUTER socket served by one thread: each well-formed message goes to ``handler``, its result back.

    Malformed messages are dropped and counted: their sender gets nothing to work with.
    """

    def __init__(self, socket: zmq.Socket, handler: Handler, limits: Limits, name: str) -> None:
        self.dropped = 0
        self._socket = socket
        self._handler = handler
        self._limits = limits
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and close the socket."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        while not self._stop.is_set():
            if poller.poll(POLL_MS):
                self._serve_one()
        self._socket.close()

    def _serve_one(self) -> None:
        sender, *frames = self._socket.recv_multipart(copy=False)
        try:
            buffers = [frame.buffer for frame in frames]
            if not buffers:
                raise FrameError("an empty message")
            header = parse_header(buffers[0], self._limits)
            reply = self._handler(header, buffers[1:])
        except FrameError as error:
            self.dropped += 1
            if worth_telling(self.dropped):
                log.warning("dropped %d malformed messages so far, the last for this: %s", self.dropped, error)
            return
        except Exception:  # a fault of ours: this thread must outlive it, the sender runs into its deadline
            log.exception("a message could not be handled")
            return
        if reply is not None:
            try:
                self._socket.send_multipart([sender.bytes, *reply], flags=zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:  # the client went away or stopped reading; it will ask again
                log.warning("could not send an answer: %s", error)


class WorkerServer:
    """Serves one worker on ``address``; ``endpoint`` tells clients where and with which key.

    Raises OSError where it can't be bound.

    Args:
        ports: for calls, and for heartbeats and orders; None: free ones.
        advertise: where clients reach these, each as "HOST:PORT"; None: as bound.
    """

    def __init__(
        self,
        worker: Worker,
        address: str,
        limits: Limits,
        clients: set[bytes],
        context: zmq.Context | None = None,
        *,
        ports: tuple[int, int] | None = None,
        advertise: tuple[str, str] | None = None,
    ) -> None:
        self._worker = worker
        self._limits = limits
        self._context = context or zmq.Context(io_threads=1)
        self.clients = AllowedClients(clients)
        self._door = Door(self._context, self.clients)
        keys = KeyPair.create()
        data_port, control_port = ports or (None, None)
        try:
            data, data_endpoint = server_socket(self._context, address, keys, limits, data_port)
            control, control_endpoint = server_socket(self._context, address, keys, limits, control_port)
        except OSError:  # whoever tries again must find the first port free
            self._door.close()
            self._context.destroy(linger=0)
            raise
        if advertise is not None:
            data_endpoint, control_endpoint = (f"tcp://{place}" for place in advertise)
        self.endpoint = Endpoint(data=data_endpoint, control=control_endpoint, public_key=keys.public)
        self._door.watch(data, control)
        self._threads = [
            SocketThread(data, self._on_call, limits, f"calls-{worker.name}"),
            SocketThread(control, self._on_control, limits, f"control-{worker.name}"),
        ]

    @property
    def dropped(self) -> int:
        """Malformed and replayed messages so far."""
        return sum(thread.dropped for thread in self._threads) + self._door.replayed

    @property
    def refused(self) -> int:
        """Connections so far that were not let in, or were cut for a forged frame."""
        return self._door.refused

    def close(self) -> None:
        """Stop serving; the worker lives on."""
        for thread in self._threads:
            thread.close()
        self._door.close()
        self._context.term()

    def _on_call(self, header: Header, body: Sequence[Buffer]) -> Message | None:
        if header.kind is not Kind.CALL:
            raise FrameError(f"{header.kind.name} does not belong on the data socket")
        call = parse_call(header, body, self._limits)
        if call.layer >= self._worker.num_layers:
            raise FrameError(f"layer {call.layer}, but the model has {self._worker.num_layers}")
        try:
            return pack_answer(header.request, self._worker.compute(call))
        except Exception as error:  # whatever went wrong is the caller's to handle; this thread must live
            log.exception("an expert call failed")
            return pack_text(Kind.ERROR, header.request, f"{type(error).__name__}: {error}")

    def _on_control(self, header: Header, body: Sequence[Buffer]) -> Message | None:
        if header.kind is Kind.PING:
            return [Header(kind=Kind.PONG, dtype=torch.float32, request=header.request).pack()]
        if header.kind is Kind.PREFETCH:
            identifiers, scores, _ = parse_experts(header, body, self._limits)
            layers, experts = layer_and_expert(np.array(identifiers, dtype=np.int64))
            for layer in np.unique(layers).tolist():
                mine = layers == layer
                self._worker.expect(layer, experts[mine], np.array(scores, dtype=np.float32)[mine])
            return None
        if header.kind is Kind.ORDER:
            order = parse_order(header, body, self._limits)
            if order.layer >= self._worker.num_layers:
                raise FrameError(f"an order for layer {order.layer}, but the model has {self._worker.num_layers}")
            self._worker.order(order)
            return None
        if header.kind is Kind.FORGET:
            self._worker.forget(parse_forget(header, body, self._limits))
            return None
        raise FrameError(f"{header.kind.name} does not belong on the control socket")
