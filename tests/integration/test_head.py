"""A head whose state outlives it: the GCS is killed for longer than leases last, and started again.

With Ray's embedded store, and with a real Redis where `redis-server` is installed.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from raymoe.actors.names import NAMESPACE, placement_name
from raymoe.config import ClusterConfig
from raymoe.serve.app import build_application
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

OUTAGE_S = 18.0  # longer than the 15 s after which a lease lapses, shorter than the 60 s after which Ray gives up
BODY: dict[str, Any] = {"prompt": "It is a truth", "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
CONFIG = {
    "model": {"dtype": "float32"},
    "devices": [{"name": "edge-0", "slot_memory": "12MiB"}, {"name": "edge-1", "slot_memory": "12MiB"}],
}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set some variables for a while."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


@contextmanager
def store(kind: str, directory: Path) -> Iterator[None]:
    """Where the head keeps its state, told to Ray as its documentation says."""
    if kind == "embedded":
        with environment(RAY_gcs_storage="rocksdb", RAY_gcs_storage_path=str(directory)):
            yield
        return
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(lambda: listens(port), "the start of Redis")
        with environment(RAY_REDIS_ADDRESS=f"127.0.0.1:{port}"):
            yield
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Headed:
    """A served application on a cluster whose head can be hit."""

    cluster: Cluster
    url: str

    def text(self) -> str:
        answer = httpx.post(f"{self.url}/v1/completions", json=BODY, timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def workers(self) -> dict[str, tuple[str, int, int]]:
        """State, process and experts of each device."""
        devices = httpx.get(f"{self.url}/v1/stats", timeout=WAIT_S).raise_for_status().json()["devices"]
        return {name: (each["state"], each["pid"], each["owned"]) for name, each in devices.items()}


@pytest.fixture(params=["embedded", "redis"])
def headed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Headed]:
    """A head without processors, and a node that computes."""
    with ExitStack() as stack:
        stack.enter_context(store(request.param, tmp_path))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        stack.callback(ray.shutdown)
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(ClusterConfig.parse(CONFIG)), name="raymoe")
        yield Headed(cluster=cluster, url=f"http://127.0.0.1:{port}")
        serve.shutdown()


def test_generation_goes_on_without_the_head_and_everything_is_there_when_it_is_back(headed: Headed) -> None:
    wanted, before = headed.text(), headed.workers()
    head = headed.cluster.head_node
    head.kill_gcs_server()
    end_s, answers = time.monotonic() + OUTAGE_S, 0
    while time.monotonic() < end_s:
        assert headed.text() == wanted
        assert httpx.get(f"{headed.url}/health", timeout=WAIT_S).status_code == 200
        assert headed.workers() == before
        answers += 1
        time.sleep(0.5)
    assert answers >= 3
    head.start_gcs_server()
    assert headed.workers() == before
    assert headed.text() == wanted
    ray.kill(ray.get_actor(placement_name("raymoe"), NAMESPACE), no_restart=False)
    assert headed.text() == wanted

    def is_restored() -> bool:
        try:
            return headed.workers() == before
        except httpx.HTTPError:
            return False

    until(is_restored, "the return of the placement actor, which the head starts again")
