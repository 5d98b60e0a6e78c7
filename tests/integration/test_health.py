"""Devices that die, come back and join, on real Ray: their states, and who owns what afterwards."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

import raymoe
from raymoe.actors.names import NAMESPACE, placement_name
from raymoe.actors.session import cluster_status
from raymoe.errors import StartError
from raymoe.observe.stats import ClusterStats
from tests.ray_nodes import ray_nodes
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

PROMPT = list(range(200, 216))
ONE_EXPERT = 196_608
EXPERTS = 256


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head, on which two devices live; further nodes come and go."""
    with ray_nodes() as cluster:
        yield cluster


def boxes(*devices: dict, **more) -> dict:
    return {"model": {"dtype": "float32"}, "devices": list(devices), **more}


def stats(app: str) -> ClusterStats:
    """Of a running application, once its placement actor answers."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            return cluster_status(app, names=False)
        except StartError:
            assert time.monotonic() < end
            time.sleep(0.1)


class Seen:
    """States that a device passes through, as they are seen."""

    def __init__(self, app: str, device: str) -> None:
        self._app, self._device = app, device
        self.states: list[str] = []
        self.start_s = time.monotonic()
        self.at_s: dict[str, float] = {}

    def look(self) -> str:
        state = stats(self._app).devices[self._device].state
        if not self.states or self.states[-1] != state:
            self.states.append(state)
            self.at_s[state] = time.monotonic() - self.start_s
        return state


def placement(app: str):
    return ray.get_actor(placement_name(app), NAMESPACE)


def owners(app: str) -> dict[str, int]:
    """How many experts engines may ask each device for."""
    view = ray.get(placement(app).view.remote())
    return {name: len(keys) for name, keys in view.ownership.items()}


def is_whole(app: str) -> bool:
    view = ray.get(placement(app).view.remote())
    return len({key for keys in view.ownership.values() for key in keys}) == EXPERTS


def test_a_killed_worker_is_noticed_replaced_and_taken_in_again(cluster: Cluster) -> None:
    config = boxes({"name": "a"}, {"name": "b"}, replication=1)
    with raymoe.launch(config, app="killed") as moe:
        before = moe.generate(PROMPT, max_tokens=4, temperature=0.0).token_ids
        assert {device.state for device in stats("killed").devices.values()} == {"healthy"}
        seen = Seen("killed", "b")
        seen.look()
        os.kill(stats("killed").devices["b"].pid, signal.SIGKILL)
        until(lambda: seen.look() == "down", "the end of the device's health")
        until(lambda: seen.look() and owners("killed") == {"a": EXPERTS, "b": 0}, "the repair")
        repaired_s = time.monotonic() - seen.start_s
        until(lambda: seen.look() == "healthy", "the device's return")
        until(lambda: sum(owners("killed").values()) == EXPERTS and owners("killed")["b"] > 0, "its share")
        assert seen.states.index("down") < seen.states.index("healthy", 1)
        now = stats("killed")
        assert now.devices["b"].restarts == 1 and now.devices["b"].reason is None and now.repairs >= 1
        assert moe.stats().repairs >= now.repairs, "the engine tells what the placement actor knows"
        until(lambda: sum(d.owned for d in stats("killed").devices.values()) == EXPERTS, "the end of spare copies")
        assert moe.generate(PROMPT, max_tokens=4, temperature=0.0).token_ids == before
        print(f"down after {seen.at_s['down']:.2f} s, repaired after {repaired_s:.2f} s, {seen.at_s}")


def test_a_paused_worker_keeps_its_shard(cluster: Cluster) -> None:
    with raymoe.launch(boxes({"name": "a"}, {"name": "b"}, replication=1), app="paused"):
        before = stats("paused").devices["b"]
        seen = Seen("paused", "b")
        os.kill(before.pid, signal.SIGSTOP)
        try:
            until(lambda: seen.look() == "down", "the end of the device's health")
            until(lambda: owners("paused") == {"a": EXPERTS, "b": 0}, "the repair")
        finally:
            os.kill(before.pid, signal.SIGCONT)
        until(lambda: seen.look() == "healthy", "the device's return")
        after = stats("paused").devices["b"]
        assert (after.pid, after.restarts) == (before.pid, 0)
        until(lambda: sum(owners("paused").values()) == EXPERTS, "the end of spare copies")
        assert is_whole("paused")


def test_a_node_that_leaves_is_done_without_and_one_that_comes_takes_its_share(cluster: Cluster) -> None:
    config = boxes({"name": "a"}, {"name": "b", "node_labels": {"box": "b"}, "optional": True}, replication=1)
    with raymoe.launch(config, app="joined"):
        now = stats("joined")
        assert now.devices["b"].state == "down" and "no node offers {'box': 'b'}" in (now.devices["b"].reason or "")
        assert owners("joined") == {"a": EXPERTS, "b": 0}
        start_s = time.monotonic()
        node = cluster.add_node(num_cpus=1, labels={"box": "b"})
        until(lambda: owners("joined")["b"] > 0, "the new device's share")
        joined_s = time.monotonic() - start_s
        until(lambda: sum(owners("joined").values()) == EXPERTS, "the end of spare copies")
        assert 0.3 * EXPERTS < owners("joined")["b"] < 0.7 * EXPERTS  # by the nodes' free memory
        assert stats("joined").devices["b"].state == "healthy"

        start_s = time.monotonic()
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: owners("joined") == {"a": EXPERTS, "b": 0}, "the repair")
        repaired_s = time.monotonic() - start_s
        print(f"joined after {joined_s:.2f} s, repaired after {repaired_s:.2f} s")


def test_a_placement_actor_that_dies_knows_the_devices_again(cluster: Cluster) -> None:
    config = boxes({"name": "a"}, {"name": "b"}, {"name": "c"}, replication=2)
    with raymoe.launch(config, app="forgot") as moe:
        before = ray.get(placement("forgot").view.remote())
        ray.kill(placement("forgot"), no_restart=False)
        assert moe.generate(PROMPT, max_tokens=2).usage.completion_tokens == 2
        until(lambda: {d.state for d in stats("forgot").devices.values()} == {"healthy"}, "the devices' health")
        until(lambda: rejoined("forgot"), "the engine's return")
        assert ray.get(placement("forgot").view.remote()).ownership == before.ownership
        os.kill(stats("forgot").devices["c"].pid, signal.SIGKILL)
        until(lambda: owners("forgot")["c"] == 0, "the end of the device's health")
        until(lambda: is_whole("forgot") and sum(owners("forgot").values()) == 2 * EXPERTS, "the repair")


def rejoined(app: str) -> bool:
    """Whether an engine has told a restarted placement actor what it knows."""
    try:
        ray.get(placement(app).view.remote())
        return True
    except ray.exceptions.RayTaskError:
        return False


def test_an_engine_starts_while_a_device_is_down(cluster: Cluster) -> None:
    config = boxes({"name": "a"}, {"name": "b"}, replication=2)
    with raymoe.launch(config, app="again") as moe:
        tokens = moe.generate(PROMPT, max_tokens=4, temperature=0.0).token_ids
        pid = stats("again").devices["b"].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: stats("again").devices["b"].state == "down", "the end of the device's health")
            with raymoe.launch(config, app="again") as other:
                assert other.generate(PROMPT, max_tokens=4, temperature=0.0).token_ids == tokens
                assert stats("again").warnings == (
                    "every expert has 1 owner(s) instead of 2, for want of devices or of their memory",
                )
        finally:
            os.kill(pid, signal.SIGCONT)
