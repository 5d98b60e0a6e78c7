"""Bad peers of a worker's sockets: one whose key is admitted and who sends nonsense, and one who is a stranger."""

import contextlib
import random
import socket
import time

import numpy as np
import torch
import zmq

from raymoe.experts.call import ExpertCall, LoadOrder
from raymoe.transport.frames import Header, Kind, Limits, Message, pack_call, pack_experts, pack_forget, pack_order
from raymoe.transport.sockets import KeyPair, client_socket
from raymoe.types import StepId
from tests.frames import Frames, wire

MESSAGES_PER_S = 200.0  # enough to be a nuisance; a flood at full rate would be a test of two cores
CONNECTIONS_PER_S = 20.0


def whole_messages() -> list[Message]:
    """One of each kind that a worker takes."""
    hidden_RH = torch.zeros(2, 8)
    call = ExpertCall(
        layer=0, hidden_RH=hidden_RH, experts_P=np.array([0, 1], np.int32), rows_P=np.array([0, 1], np.int32)
    )
    order = LoadOrder(step=StepId(sequence=1, position=1), epoch=0, layer=0, experts=np.array([0, 1], np.int32))
    ping = Header(kind=Kind.PING, dtype=torch.float32, request=1).pack()
    return [
        pack_call(7, call),
        [ping],
        pack_experts(Kind.PREFETCH, 8, [0, 1], [0.5, 0.5]),
        pack_order(order),
        pack_forget(3),
    ]


def malformed(draw: random.Random) -> Frames:
    """A message that no worker may accept: a header of no kind, or a body that is not what the header says."""
    frames = wire(draw.choice(whole_messages()))
    header = bytearray(frames[0])
    match draw.randrange(5):
        case 0:
            header[draw.randrange(4)] ^= 0xFF  # the magic
        case 1:
            header[5] = draw.randrange(100, 256)  # no such kind
        case 2:
            return [bytes(header[: draw.randrange(len(header))]), *frames[1:]]
        case 3:
            return [bytes(header), *frames[1:], draw.randbytes(draw.randrange(1, 100))]  # one part too many
        case _:
            return [draw.randbytes(draw.randrange(1, 200)) for _ in range(draw.randrange(1, 5))]
    return [bytes(header), *frames[1:]]


def flood(endpoints: tuple[str, str], server_key: bytes, keys: KeyPair, *, seconds: float, seed: int) -> int:
    """Send malformed messages to both sockets of a worker; returns how many were taken from us."""
    draw, sent = random.Random(seed), 0
    context = zmq.Context()
    sockets = [client_socket(context, endpoint, server_key, keys, Limits()) for endpoint in endpoints]
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        with contextlib.suppress(zmq.Again):  # not connected, or refused
            draw.choice(sockets).send_multipart(malformed(draw), flags=zmq.NOBLOCK)
            sent += 1
        time.sleep(1 / MESSAGES_PER_S)
    for peer in sockets:
        peer.close(linger=200)
    context.term()
    return sent


def knock(endpoints: tuple[str, str], *, seconds: float, seed: int) -> int:
    """Connect as a stranger does and send bytes that are no handshake, or an endless one; returns how often."""
    draw, knocks = random.Random(seed), 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        host, port = draw.choice(endpoints).removeprefix("tcp://").rsplit(":", 1)
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1.0) as connection:
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(draw.randrange(60))
            connection.sendall(
                draw.choice((draw.randbytes(draw.randrange(1, 5000)), greeting, b"GET / HTTP/1.1\r\n\r\n"))
            )
            knocks += 1
        time.sleep(1 / CONNECTIONS_PER_S)
    return knocks
