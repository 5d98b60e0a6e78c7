"""Heartbeats over loopback, and which devices the nodes of a Ray cluster can take."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from raymoe.actors.nodes import is_offered
from raymoe.config import DeviceConfig
from raymoe.transport.frames import Limits
from raymoe.transport.heartbeats import Heartbeats
from raymoe.transport.server import WorkerServer
from raymoe.transport.sockets import KeyPair
from raymoe.types import DeviceName
from tests.waiting import until

A, B = DeviceName("a"), DeviceName("b")
LIMITS = Limits()


@dataclass
class Silent:
    """A worker of which only the name matters."""

    name: str
    num_layers: int = 1


@dataclass
class Ear:
    """Hears pongs and rounds."""

    pongs: list[tuple[str, str]] = field(default_factory=list)
    rounds: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pong(self, device: DeviceName, incarnation: str, now_s: float) -> None:
        with self.lock:
            self.pongs.append((device, incarnation))

    def round(self, now_s: float) -> None:
        self.rounds += 1

    def count(self, device: str, incarnation: str) -> int:
        with self.lock:
            return self.pongs.count((device, incarnation))


@contextmanager
def served(keys: KeyPair, name: str) -> Iterator[WorkerServer]:
    server = WorkerServer(Silent(name), "127.0.0.1", LIMITS, {keys.public})  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


def test_a_dead_worker_does_not_delay_what_is_heard_of_others() -> None:
    keys, ear = KeyPair.create(), Ear()
    beats = Heartbeats(keys, LIMITS, ear.pong, ear.round)
    try:
        with served(keys, "a") as living:
            with served(keys, "b") as dying:
                beats.watch({A: ("a1", living.endpoint), B: ("b1", dying.endpoint)})
                until(lambda: ear.count("a", "a1") > 0 and ear.count("b", "b1") > 0, "an answer of both", 30)
            dead_answers, rounds = ear.count("b", "b1"), ear.rounds
            before = ear.count("a", "a1")
            until(lambda: ear.rounds >= rounds + 4, "four rounds", 30)
            assert ear.count("a", "a1") > before
            assert ear.count("b", "b1") <= dead_answers + 1  # one may have been on its way
    finally:
        beats.close()


def test_another_process_of_a_device_is_asked_under_its_own_name() -> None:
    keys, ear = KeyPair.create(), Ear()
    beats = Heartbeats(keys, LIMITS, ear.pong, ear.round)
    try:
        with served(keys, "a") as first, served(keys, "a") as second:
            beats.watch({A: ("a1", first.endpoint)})
            until(lambda: ear.count("a", "a1") > 0, "the first one's answer", 30)
            beats.watch({A: ("a2", second.endpoint)})
            until(lambda: ear.count("a", "a2") > 1, "the second one's answers", 30)
            heard = ear.count("a", "a1")
            until(lambda: ear.count("a", "a2") > 3, "more of them", 30)
            assert ear.count("a", "a1") == heard
    finally:
        beats.close()


# --- nodes ----------------------------------------------------------------------------------------------


def node(alive: bool = True, labels: dict | None = None, **resources: float) -> dict:
    return {"Alive": alive, "Labels": labels or {}, "Resources": resources}


@pytest.mark.parametrize(
    "wanted, nodes, offered",
    [
        ({}, [node()], True),
        ({}, [node(alive=False)], False),
        ({"node_labels": {"box": "b"}}, [node(labels={"box": "a"})], False),
        ({"node_labels": {"box": "b"}}, [node(labels={"box": "a"}), node(labels={"box": "b"})], True),
        ({"node_labels": {"box": "b"}}, [node(labels={"box": "b"}, alive=False)], False),
        ({"node_labels": {"box": "!b"}}, [node(labels={"box": "b"})], False),
        ({"node_labels": {"box": "!b"}}, [node()], True),
        ({"node_labels": {"box": "in(a, b)"}}, [node(labels={"box": "b"})], True),
        ({"node_labels": {"box": "!in(a, b)"}}, [node(labels={"box": "b"})], False),
        ({"resources": {"jetson": 1.0}}, [node(jetson=1.0)], True),
        ({"resources": {"jetson": 2.0}}, [node(jetson=1.0), node(jetson=1.0)], False),
        (
            {"resources": {"jetson": 1.0}, "node_labels": {"box": "b"}},
            [node(jetson=1.0), node(labels={"box": "b"})],
            False,
        ),
    ],
)
def test_a_device_is_offered_by_an_alive_node_with_all_that_it_asks_for(wanted, nodes, offered) -> None:
    assert is_offered(DeviceConfig.model_validate({"name": "d", **wanted}), nodes) is offered
