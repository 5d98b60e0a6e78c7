"""The proxy of the chaos tests, between real sockets on loopback."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from raymoe.transport.client import WorkerClient
from raymoe.transport.frames import Limits
from raymoe.transport.server import WorkerServer
from raymoe.transport.sockets import KeyPair
from raymoe.types import DeviceName
from tests.chaos.proxy import CLEAR, Condition, Plane, Proxy
from tests.free_ports import free_ports
from tests.waiting import until

WAIT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """A proxy before two sockets that send back what they get."""

    proxy: Proxy

    def connect(self, plane: Plane = Plane.CALLS) -> socket.socket:
        place = self.proxy.links["edge"].advertise[list(Plane).index(plane)]
        host, port = place.split(":")
        return socket.create_connection((host, int(port)), timeout=WAIT_S)


def serve_echo(listener: socket.socket) -> None:
    """Until the listener is closed."""

    def answer(connection: socket.socket) -> None:
        try:
            while data := connection.recv(1 << 16):
                connection.sendall(data)
        except OSError:
            pass
        connection.close()

    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


@pytest.fixture
def echo() -> Iterator[Echo]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in Plane]
    for listener in listeners:
        threading.Thread(target=serve_echo, args=(listener,), daemon=True).start()
    first, second = (listener.getsockname()[1] for listener in listeners)
    with Proxy({"edge": (first, second)}, seed=1) as proxy:
        yield Echo(proxy=proxy)
    for listener in listeners:
        listener.close()


def exchange(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    found = b""
    while len(found) < len(data):
        more = connection.recv(1 << 16)
        if not more:
            raise ConnectionError("closed")
        found += more
    return found


def ends(connection: socket.socket) -> bool:
    """Whether the connection ends instead of answering."""
    try:
        connection.sendall(b"x")
        return connection.recv(10) == b""
    except ConnectionError:
        return True


def refuses(echo: Echo) -> bool:
    """Whether a new connection ends at once, in the middle of being made or just after."""
    try:
        with echo.connect() as connection:
            return ends(connection)
    except ConnectionError:
        return True


def test_bytes_pass_unchanged_both_ways_and_are_counted(echo: Echo) -> None:
    data = bytes(range(256)) * 1000
    with echo.connect(Plane.CALLS) as calls, echo.connect(Plane.ORDERS) as orders:
        assert exchange(calls, data) == data
        assert exchange(orders, b"ping") == b"ping"
    assert echo.proxy.links["edge"].carried_bytes == 2 * (len(data) + 4)


def test_a_delayed_link_is_late_and_a_slow_one_takes_its_time(echo: Echo) -> None:
    with echo.connect() as connection:
        exchange(connection, b"warm")
        echo.proxy.become("edge", Condition(delay_s=0.05))
        start_s = time.monotonic()
        assert exchange(connection, b"x") == b"x"
        assert time.monotonic() - start_s >= 0.1  # there and back
        echo.proxy.become("edge", Condition(bytes_per_s=1e5))
        start_s = time.monotonic()
        exchange(connection, bytes(5000))
        assert time.monotonic() - start_s >= 0.1


def test_a_stalled_plane_passes_nothing_and_then_everything(echo: Echo) -> None:
    with echo.connect(Plane.CALLS) as calls, echo.connect(Plane.ORDERS) as orders:
        exchange(calls, b"warm")
        echo.proxy.become("edge", Condition(stalled=(Plane.CALLS,)))
        calls.sendall(b"held")
        calls.settimeout(0.2)
        with pytest.raises(TimeoutError):
            calls.recv(10)
        assert exchange(orders, b"ping") == b"ping"
        echo.proxy.become("edge", CLEAR)
        calls.settimeout(WAIT_S)
        assert calls.recv(10) == b"held"


def test_a_cut_link_resets_what_is_there_and_what_comes(echo: Echo) -> None:
    with echo.connect() as connection:
        exchange(connection, b"warm")
        echo.proxy.become("edge", Condition(cut=True))
        assert ends(connection)
        assert refuses(echo)
    echo.proxy.become("edge", CLEAR)
    with echo.connect() as connection:
        assert exchange(connection, b"again") == b"again"


def test_corrupted_chunks_differ_in_one_byte_and_dropped_ones_are_missing(echo: Echo) -> None:
    with echo.connect() as connection:
        echo.proxy.become("edge", Condition(corrupted=1.0))
        found = exchange(connection, bytes(100))  # changed there and back, so in one place or two
        assert len(found) == 100 and 1 <= sum(byte != 0 for byte in found) <= 2
        echo.proxy.become("edge", Condition(dropped=1.0))
        spoiled = echo.proxy.links["edge"].spoiled
        connection.sendall(b"lost")
        until(lambda: echo.proxy.links["edge"].spoiled > spoiled, "the loss")
        echo.proxy.become("edge", CLEAR)
        assert exchange(connection, b"next") == b"next"


def test_a_target_that_is_gone_is_like_a_worker_that_refuses() -> None:
    first, second = free_ports(2)
    with Proxy({"edge": (first, second)}) as proxy:
        assert refuses(Echo(proxy=proxy))


class Computer:
    """A worker that is only pinged."""

    name = "edge"
    num_layers = 1


@contextmanager
def worker_behind(proxy: Proxy, keys: KeyPair, ports: tuple[int, int]) -> Iterator[WorkerClient]:
    limits, advertise = Limits(), proxy.links["edge"].advertise
    server = WorkerServer(
        Computer(),  # type: ignore[arg-type]
        "127.0.0.1",
        limits,
        {keys.public},
        ports=ports,
        advertise=advertise,
    )
    client = WorkerClient({DeviceName("edge"): server.endpoint}, keys, limits)
    try:
        yield client
    finally:
        client.close()
        server.close()


@pytest.mark.parametrize("fault", [Condition(cut=True), Condition(corrupted=1.0), Condition(dropped=1.0)])
def test_an_encrypted_connection_breaks_and_comes_back(fault: Condition) -> None:
    """What is changed or missing is never taken for a message: the connection ends, and is made anew."""
    keys, (first, second) = KeyPair.create(), free_ports(2)
    with Proxy({"edge": (first, second)}) as proxy, worker_behind(proxy, keys, (first, second)) as client:
        edge = DeviceName("edge")
        assert client.ping(edge, WAIT_S) is not None
        proxy.become("edge", fault)
        assert client.ping(edge, 0.5) is None
        proxy.become("edge", CLEAR)
        until(lambda: client.ping(edge, 0.5) is not None, "an answer", WAIT_S)
