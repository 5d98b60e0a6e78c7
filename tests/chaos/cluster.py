"""A real cluster to break: a head and three edge nodes, each with a raylet of its own, and the model served over HTTP.

Everything is a process of this machine, found by its actor's name in Ray's own table.
"""

import contextlib
import signal
import time
from types import TracebackType
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray._private import state
from ray.cluster_utils import Cluster

from raymoe.actors.names import NAMESPACE, placement_name, shadow_name, worker_name
from raymoe.config import ClusterConfig
from raymoe.serve.app import build_application
from raymoe.transport.sockets import KeyPair
from tests.chaos.proxy import Proxy
from tests.chaos.schedule import Kind
from tests.free_ports import free_ports

APP = "chaos"
DEVICES = ("edge-0", "edge-1", "edge-2")
SLOTS = "4MiB"  # of 48 MiB of experts, so that they come and go
STORE_BYTES = 80 << 20  # Ray's least; nothing of ours is in it
PROCESS_S = 60.0  # the most to wait for a process that Ray is starting again
ADMIT_S = 10.0
WITH_SHADOW = ("on_demand_shadow", "joint")
POLICIES = ("on_demand", "importance", *WITH_SHADOW)


def kinds_for(policy: str) -> tuple[Kind, ...]:
    """The kinds of fault that can hit a cluster of this policy."""
    return tuple(kind for kind in Kind if policy in WITH_SHADOW or kind is not Kind.KILL_SHADOW)


def configuration(policy: str, ports: dict[str, tuple[int, int]], proxy: Proxy) -> ClusterConfig:
    """Three devices of which any two hold everything, reached through the proxy."""
    devices = [
        {
            "name": name,
            "slot_memory": SLOTS,
            "resources": {name: 1},
            "ports": list(ports[name]),
            "advertise": list(proxy.links[name].advertise),
        }
        for name in DEVICES
    ]
    config: dict[str, Any] = {
        "model": {"dtype": "float32"},
        "devices": devices,
        "trunk": {"threads": 1, "kv_memory": "24MiB", "prefix_memory": "4MiB"},
        "replication": 2,
        "scheduling": {"policy": policy},
    }
    if policy in WITH_SHADOW:
        config["predictor"] = {"kind": "shadow", "bits": 8}
    return ClusterConfig.parse(config)


class ChaosCluster:
    """The cluster, while this is entered.

    Attributes:
        url: of the model's HTTP API.
        proxy: what lies before the workers' sockets.
    """

    def __init__(self, policy: str, seed: int) -> None:
        chosen = free_ports(2 * len(DEVICES) + 1)
        self._ports = {name: (chosen[2 * i], chosen[2 * i + 1]) for i, name in enumerate(DEVICES)}
        self.url = f"http://127.0.0.1:{chosen[-1]}"
        self.proxy = Proxy(self._ports, seed)
        self._http_port = chosen[-1]
        self._policy = policy
        self._nodes: dict[str, Any] = {}
        self._peers: dict[str, KeyPair] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ChaosCluster":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.proxy)
            head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
            stack.callback(self._cluster.shutdown)
            for name in DEVICES:
                self.add_node(name)
            self._cluster._shutdown_at_exit = False  # hooks of later nodes: signals, which only the main thread may set
            ray.init(address=self._cluster.address, log_to_driver=False)
            stack.callback(ray.shutdown)
            serve.start(http_options={"host": "127.0.0.1", "port": self._http_port})
            stack.callback(serve.shutdown)
            self.config = configuration(self._policy, self._ports, self.proxy)
            serve.run(build_application(self.config), name=APP)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def stats(self) -> dict[str, Any]:
        """What the server says of itself. Raises httpx.HTTPError where it does not."""
        found: dict[str, Any] = httpx.get(f"{self.url}/v1/stats", timeout=30.0).raise_for_status().json()
        return found

    # --- nodes ------------------------------------------------------------------------------------------

    def add_node(self, device: str) -> None:
        """A node that offers what ``device`` asks for. It has no CPUs, so that nothing of Serve's comes to it."""
        self._nodes[device] = self._cluster.add_node(
            num_cpus=0, resources={device: 1}, object_store_memory=STORE_BYTES, include_dashboard=False
        )

    def kill_node(self, device: str) -> None:
        """End a device's raylet without a word, and its worker. Returns when both are gone."""
        workers = find(worker_name(APP, device))
        self._cluster.remove_node(self._nodes.pop(device), allow_graceful=False)
        for process in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(workers, timeout=PROCESS_S)

    # --- processes --------------------------------------------------------------------------------------

    def worker(self, device: str) -> psutil.Process:
        """The worker's process. This and the next ones wait for it, and raise TimeoutError where it does not come."""
        return wait_for(worker_name(APP, device))

    def placement(self) -> psutil.Process:
        """The placement actor's process."""
        return wait_for(placement_name(APP))

    def shadow(self) -> psutil.Process:
        """The shadow's process."""
        return wait_for(shadow_name(APP))

    def engine(self) -> psutil.Process:
        """The process of Serve's replica of the engine."""
        return wait_for(f"{APP}#engine#")

    # --- peers ------------------------------------------------------------------------------------------

    def endpoints(self, device: str) -> tuple[str, str]:
        """Where a stranger finds a worker's sockets: not through the proxy, which may be at fault itself."""
        first, second = (f"tcp://127.0.0.1:{port}" for port in self._ports[device])
        return first, second

    def admit(self, device: str) -> tuple[bytes, KeyPair]:
        """A key pair that a worker admits, and its own public key. Raises RayError where it does not answer."""
        keys = self._peers.setdefault(device, KeyPair.create())
        worker: Any = ray.get_actor(worker_name(APP, device), NAMESPACE)
        endpoint = ray.get(worker.serve.remote("127.0.0.1", (keys.public,)), timeout=ADMIT_S)
        return endpoint.public_key, keys


def find(name: str) -> list[psutil.Process]:
    """Living processes of actors whose name has ``name``."""
    found = []
    for actor in state.actors().values():
        if name in actor["Name"] and actor["State"] == "ALIVE":
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(actor["Pid"])
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def wait_for(name: str) -> psutil.Process:
    """The one process of an actor whose name has ``name``; waits for it."""
    end_s = time.monotonic() + PROCESS_S
    while time.monotonic() < end_s:
        if found := find(name):
            return found[0]
        time.sleep(0.1)
    raise TimeoutError(f"no process of {name} lives, and none came within {PROCESS_S:g} s")


def kill(process: psutil.Process) -> None:
    """SIGKILL, also to one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
