"""Strangers at the sockets: who has no key reaches no handler, what was sent once is not taken twice, all is counted.

Real ZeroMQ sockets on loopback, within this process.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import zmq

from raymoe.errors import FrameError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder
from raymoe.transport import sockets
from raymoe.transport.client import WorkerClient
from raymoe.transport.door import AllowedClients, Door, worth_telling
from raymoe.transport.frames import Header, Kind, Limits, pack_answer, pack_call, parse_call, parse_header
from raymoe.transport.server import WorkerServer
from raymoe.transport.sockets import Endpoint, KeyPair, client_socket, server_socket
from raymoe.types import DeviceName
from tests.asking import gather
from tests.frames import wire
from tests.taps import Tap
from tests.waiting import until

LIMITS = Limits(layers=8, rows=64, pairs=256, hidden=64, experts=32, changes=64, body_bytes=1 << 16)
EDGE = DeviceName("edge")
TIMEOUT_S = 30.0
SILENT = 200  # connections, about three times the backlog


class Counting:
    """A worker that counts whatever reaches it."""

    name = "edge"
    num_layers = 2

    def __init__(self) -> None:
        self.reached = 0

    def compute(self, call: ExpertCall) -> ExpertAnswer:
        self.reached += 1
        return ExpertAnswer(output_PH=call.hidden_RH[torch.from_numpy(call.rows_P.copy())] + self.reached)

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        self.reached += 1

    def order(self, order: LoadOrder) -> None:
        self.reached += 1

    def forget(self, sequence: int) -> None:
        self.reached += 1


class Served:
    """A worker behind its server, and the one key pair that may ask it."""

    def __init__(self) -> None:
        self.worker, self.keys = Counting(), KeyPair.create()
        self.server = WorkerServer(self.worker, "127.0.0.1", LIMITS, {self.keys.public})

    def client(self, data: str | None = None) -> WorkerClient:
        """An admitted one, by way of another address where one is given."""
        ours = self.server.endpoint
        return WorkerClient({EDGE: Endpoint(data=data or ours.data, control=ours.control, public_key=ours.public_key)},
                            self.keys, LIMITS)  # fmt: skip


@pytest.fixture
def served() -> Iterator[Served]:
    whole = Served()
    yield whole
    whole.server.close()


@contextmanager
def closing(client: WorkerClient) -> Iterator[WorkerClient]:
    try:
        yield client
    finally:
        client.close()


@contextmanager
def raw(endpoint: str, server_key: bytes, keys: KeyPair) -> Iterator[zmq.Socket]:
    with zmq.Context() as context:
        dealer = client_socket(context, endpoint, server_key, keys, LIMITS)
        dealer.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        yield dealer
        dealer.close()


def some_call() -> ExpertCall:
    pairs = np.zeros(1, dtype=np.int32)
    return ExpertCall(layer=0, hidden_RH=torch.ones(1, 8), experts_P=pairs, rows_P=pairs)


def ask(client: WorkerClient) -> ExpertAnswer:
    request = client.send(EDGE, some_call())
    return gather(client, {request: EDGE}, TIMEOUT_S)[request]


def connected(endpoint: str) -> socket.socket:
    """A TCP connection that knows nothing of ZeroMQ."""
    return socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=TIMEOUT_S)


def is_cut(connection: socket.socket) -> bool:
    """Read on until the other side has closed."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


# --- strangers ------------------------------------------------------------------------------------------


def knock_with_an_unknown_key(served: Served) -> None:
    with raw(served.server.endpoint.data, served.server.endpoint.public_key, KeyPair.create()) as dealer:
        dealer.send_multipart(wire(pack_call(1, some_call())))
        until(lambda: served.server.refused > 0, "counting who is refused")


def knock_with_another_server_key(served: Served) -> None:
    with raw(served.server.endpoint.data, KeyPair.create().public, served.keys) as dealer:
        dealer.send_multipart(wire(pack_call(1, some_call())))
        until(lambda: served.server.refused > 0, "counting who is refused")


def knock_without_encryption(served: Served) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(served.server.endpoint.data)
        dealer.send_multipart(wire(pack_call(1, some_call())))
        until(lambda: served.server.refused > 0, "counting who is refused")


def knock_with_a_password(served: Served) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.plain_username, dealer.plain_password = b"root", b"root"
        dealer.connect(served.server.endpoint.data)
        dealer.send_multipart(wire(pack_call(1, some_call())))
        until(lambda: served.server.refused > 0, "counting who is refused")


def knock_with_a_greeting_and_then_noise(served: Served) -> None:
    with connected(served.server.endpoint.data) as connection:
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
        connection.sendall(greeting + b"\x04\xc8" + bytes(200))
        assert is_cut(connection)


@pytest.mark.parametrize(
    "knock",
    [
        knock_with_an_unknown_key, knock_with_another_server_key, knock_without_encryption, knock_with_a_password,
        knock_with_a_greeting_and_then_noise,
    ],
)  # fmt: skip
def test_strangers_reach_no_handler_and_are_counted(served: Served, knock: Callable[[Served], None]) -> None:
    knock(served)
    until(lambda: served.server.refused > 0, "counting who is refused")
    assert served.worker.reached == served.server.dropped == 0
    with closing(served.client()) as client:
        ask(client)
    assert served.worker.reached == 1


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(8)])
def test_what_is_not_zeromq_at_all_is_cut_at_once(served: Served, noise: bytes) -> None:
    with connected(served.server.endpoint.data) as connection:
        connection.sendall(noise + bytes(64))
        assert is_cut(connection)
    assert served.worker.reached == served.server.dropped == 0


def test_whoever_is_admitted_is_not_counted(served: Served) -> None:
    with closing(served.client()) as client:
        ask(client)
        assert client.ping(EDGE, TIMEOUT_S) is not None
    assert (served.server.refused, served.server.dropped) == (0, 0)


def test_a_socket_without_a_door_admits_nobody() -> None:
    server_keys, keys = KeyPair.create(), KeyPair.create()
    with zmq.Context() as context:
        router, address = server_socket(context, "127.0.0.1", server_keys, LIMITS)
        with raw(address, server_keys.public, keys) as dealer:
            dealer.send(b"hello")
            assert not router.poll(300)
            door = Door(context, AllowedClients({keys.public}))
            assert router.poll(TIMEOUT_S * 1000) and router.recv_multipart()[1] == b"hello"
        router.close()
        door.close()


def test_silent_connections_are_cut_and_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 1000)
    served = Served()
    silent = [connected(served.server.endpoint.data) for _ in range(SILENT)]
    with closing(served.client()) as client:
        ask(client)
    assert all(is_cut(connection) for connection in silent)
    until(lambda: served.server.refused == SILENT, "counting who is refused")
    for connection in silent:
        connection.close()
    served.server.close()
    assert served.worker.reached == 1


def test_what_others_repeat_is_told_ever_more_rarely() -> None:
    assert [count for count in range(1, 100) if worth_telling(count)] == [1, 2, 4, 8, 16, 32, 64]


# --- frames that come twice -----------------------------------------------------------------------------


def test_a_frame_that_is_sent_again_costs_the_connection_and_is_computed_once(served: Served) -> None:
    with Tap(served.server.endpoint.data) as tap, closing(served.client(tap.address)) as client:
        ask(client)
        tap.again()
        until(lambda: served.server.dropped == 1, "counting what is dropped")
    assert (served.worker.reached, served.server.refused) == (1, 0)


def test_a_connection_that_is_played_again_gets_nowhere(served: Served) -> None:
    with Tap(served.server.endpoint.data) as tap:
        with closing(served.client(tap.address)) as client:
            ask(client)
        tap.whole_again()
    until(lambda: served.server.refused > 0, "counting who is refused")
    assert served.worker.reached == 1


def test_a_falsified_frame_costs_the_connection(served: Served) -> None:
    with Tap(served.server.endpoint.data) as tap, closing(served.client(tap.address)) as client:
        ask(client)
        tap.falsify = True
        client.send(EDGE, some_call())
        until(lambda: served.server.refused == 1, "counting who is refused")
    assert served.worker.reached == 1


def test_nothing_that_a_call_says_is_readable_on_the_way(served: Served) -> None:
    with Tap(served.server.endpoint.data) as tap, closing(served.client(tap.address)) as client:
        ask(client)
    sent = tap.greeting + b"".join(tap.frames)
    plain = wire(pack_call(1, some_call()))
    assert len(sent) > sum(map(len, plain))
    assert b"RMOE" not in sent and plain[1] not in sent


def test_the_same_request_twice_is_answered_twice(served: Served) -> None:
    """Of an admitted client. Calls are pure, so that harms nobody."""
    with raw(served.server.endpoint.data, served.server.endpoint.public_key, served.keys) as dealer:
        for _ in range(2):
            dealer.send_multipart(wire(pack_call(7, some_call())))
        answered = [parse_header(dealer.recv_multipart()[0], LIMITS).request for _ in range(2)]
    assert answered == [7, 7]
    assert served.worker.reached == 2


@contextmanager
def answering(keys: KeyPair, reply: Callable[[zmq.Socket, bytes, list[bytes]], None]) -> Iterator[Endpoint]:
    """A worker that answers as ``reply`` does."""
    context, server_keys, stop = zmq.Context(), KeyPair.create(), threading.Event()
    door = Door(context, AllowedClients({keys.public}))
    router, address = server_socket(context, "127.0.0.1", server_keys, LIMITS)

    def run() -> None:
        while not stop.is_set():
            if router.poll(20):
                sender, *frames = router.recv_multipart()
                reply(router, sender, frames)
        router.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield Endpoint(data=address, control=address, public_key=server_keys.public)
    stop.set()
    thread.join(TIMEOUT_S)
    door.close()
    context.term()


def test_an_answer_that_comes_twice_is_applied_once() -> None:
    """The second is a late one, whatever it says."""
    keys = KeyPair.create()

    def twice(router: zmq.Socket, sender: bytes, frames: list[bytes]) -> None:
        header = parse_header(frames[0], LIMITS)
        call = parse_call(header, frames[1:], LIMITS)
        for factor in (2.0, 3.0):
            answer = ExpertAnswer(output_PH=call.hidden_RH * factor)
            router.send_multipart([sender, *wire(pack_answer(header.request, answer))])

    with answering(keys, twice) as endpoint, closing(WorkerClient({EDGE: endpoint}, keys, LIMITS)) as client:
        outputs = [ask(client).output_PH.unique().tolist() for _ in range(3)]
        assert outputs == [[2.0]] * 3
        assert client.late_answers == 2


# --- keys -----------------------------------------------------------------------------------------------


def test_every_start_has_a_key_of_its_own() -> None:
    lives = [Served() for _ in range(3)]
    assert len({life.server.endpoint.public_key for life in lives}) == 3
    for life in lives:
        life.server.close()


def test_nothing_shows_a_secret(served: Served) -> None:
    keys = KeyPair.create()
    shown = [repr(keys), str(keys), f"{keys}", repr(served.server.endpoint), repr(vars(served.server))]
    assert not any(keys.secret.decode() in text or repr(keys.secret) in text for text in shown)
    assert served.keys.secret not in repr(vars(served.server)).encode()


def test_frames_of_a_kind_that_nobody_sends_there_are_dropped(served: Served) -> None:
    with raw(served.server.endpoint.data, served.server.endpoint.public_key, served.keys) as dealer:
        for kind in set(Kind) - {Kind.CALL}:
            dealer.send(Header(kind=kind, dtype=torch.float32, request=1).pack())
        until(lambda: served.server.dropped == len(Kind) - 1, "counting what is dropped")
    assert served.worker.reached == 0
    with pytest.raises(FrameError, match="a call needs"):
        parse_call(Header(kind=Kind.CALL, dtype=torch.float32, request=1), [], LIMITS)
