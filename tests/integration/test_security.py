"""A real cluster seen from outside: what it listens on, what its logs hold, whose keys are whose."""

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import zmq

import raymoe
from raymoe.actors.names import NAMESPACE, placement_name, shadow_name, worker_name
from raymoe.launcher import Moe
from raymoe.transport.frames import Limits
from raymoe.transport.sockets import Endpoint, KeyPair, client_socket
from tests.listening import Listener, listeners
from tests.secrets import FILE, forms, noted_secrets, noting, runtime_env
from tests.waiting import until

pytestmark = pytest.mark.integration

APP = "guarded"
DEVICES = ("edge-0", "edge-1")
CONFIG: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "devices": [{"name": name, "slot_memory": "1536KiB"} for name in DEVICES],
    "predictor": {"kind": "shadow", "bits": 8},
}
SECRETS = 7  # the engine's, two workers', the shadow's as server and as client, the placement actor's as both


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running one, its logs, and the file of its secrets."""

    moe: Moe
    logs: Path
    secrets: Path
    driver_log: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("guarded")
    secrets, driver_log = folder / "secrets", folder / "driver.log"
    patched = pytest.MonkeyPatch()
    patched.setenv(FILE, str(secrets))
    patched.setattr(zmq, "curve_keypair", zmq.curve_keypair)  # so that it is put back
    noting()
    handler = logging.FileHandler(driver_log)
    logging.getLogger().addHandler(handler)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env(secrets))
    try:
        node: Any = ray._private.worker._global_node
        with raymoe.launch(CONFIG, app=APP) as moe:
            moe.generate("It is a truth", max_tokens=8)
            yield Cluster(moe=moe, logs=Path(node.get_logs_dir_path()), secrets=secrets, driver_log=driver_log)
    finally:
        ray.shutdown()
        logging.getLogger().setLevel(level)
        logging.getLogger().removeHandler(handler)
        patched.undo()


def described(name: str) -> Any:
    """What an actor says of where it is."""
    return ray.get(ray.get_actor(name, NAMESPACE).describe.remote(), timeout=60)


def endpoints() -> dict[str, Endpoint]:
    """Of the workers and the shadow."""
    names = {device: worker_name(APP, device) for device in DEVICES} | {"shadow": shadow_name(APP)}
    return {short: described(name).endpoint for short, name in names.items()}


def ports(endpoint: Endpoint) -> set[int]:
    return {int(address.rpartition(":")[2]) for address in (endpoint.data, endpoint.control)}


def by_process() -> dict[str, list[Listener]]:
    """What the processes of this cluster that run our code listen on, by the class of their actor."""
    processes = psutil.Process().children(recursive=True)
    found: dict[str, list[Listener]] = {}
    for process in processes:
        title = " ".join(process.cmdline())
        kind = next((kind for kind in ("WorkerShell", "ShadowShell", "PlacementShell", "Bare") if kind in title), None)
        if kind is not None:
            found[f"{kind} {process.pid}"] = listeners([process.pid])
    return found


def test_no_socket_of_ours_is_on_all_interfaces(cluster: Cluster) -> None:
    """On one machine all are on loopback. What else the processes listen on is what any actor of Ray does."""

    @ray.remote(num_cpus=0)
    class Bare:
        def ready(self) -> None: ...

    bare = Bare.remote()
    ray.get(bare.ready.remote(), timeout=60)
    found = by_process()
    assert sorted(name.split()[0] for name in found) == [
        "Bare", "PlacementShell", "ShadowShell", "WorkerShell", "WorkerShell"
    ]  # fmt: skip
    rays = next(len(sockets) for name, sockets in found.items() if name.startswith("Bare"))
    ours = {"Bare": 0, "PlacementShell": 1, "ShadowShell": 1, "WorkerShell": 2}
    for name, sockets in found.items():
        loopback = [listener.port for listener in sockets if listener.is_loopback]
        assert len(loopback) == ours[name.split()[0]], f"{name} listens on {sockets}"
        assert len(sockets) - len(loopback) == rays, f"{name} listens on {sockets}"
    everywhere = {listener.port for sockets in found.values() for listener in sockets if not listener.is_loopback}
    told = set().union(*(ports(endpoint) for endpoint in endpoints().values()))
    assert len(told) == 5 and not told & everywhere


def test_the_engine_listens_on_nothing(cluster: Cluster) -> None:
    assert [listener for listener in listeners([os.getpid()]) if listener.is_loopback] == []


def test_strangers_at_every_socket_are_seen_in_the_stats(cluster: Cluster) -> None:
    before = cluster.moe.stats()
    with zmq.Context() as context:
        sockets = [
            client_socket(context, endpoint.data, endpoint.public_key, KeyPair.create(), Limits())
            for endpoint in endpoints().values()
        ]
        until(
            lambda: all(device.refused_clients > 0 for device in cluster.moe.stats().devices.values()),
            "counting who is refused",
        )
        for socket in sockets:
            socket.close()
    after = cluster.moe.stats()
    assert all(device.refused_clients == 0 for device in before.devices.values()), "nobody of ours is refused"
    assert all(device.dropped_messages == 0 for device in after.devices.values())
    assert (after.refused_clients, after.dropped_messages) == (0, 0), "of the placement actor, which nobody has asked"
    assert cluster.moe.generate("Once", max_tokens=4).token_ids


def test_keys_are_made_anew_when_a_process_starts_anew(cluster: Cluster) -> None:
    before, shadow = noted_secrets(cluster.secrets), described(shadow_name(APP))
    os.kill(shadow.pid, signal.SIGKILL)

    def is_back() -> bool:
        predictor = cluster.moe.stats().predictor
        return predictor is not None and predictor.state == "healthy" and predictor.pid not in (0, shadow.pid)

    until(is_back, "the shadow's return")
    after, again = noted_secrets(cluster.secrets), described(shadow_name(APP))
    assert {pid for secret, pid in after.items() if secret not in before} == {again.pid}
    assert again.endpoint.public_key != shadow.endpoint.public_key and again.public_key != shadow.public_key


def test_no_secret_shows_in_any_log(cluster: Cluster) -> None:
    """Though every process logs all that its libraries have to say."""
    secrets = noted_secrets(cluster.secrets)
    assert len(secrets) >= SECRETS
    assert len(set(secrets.values())) >= 5, "of the engine, two workers, shadow and placement actor"
    files = [file for file in (*cluster.logs.rglob("*"), cluster.driver_log) if file.is_file()]
    texts = {file: file.read_bytes() for file in files}
    assert any(b"ALLOWED" in text for text in texts.values()), "the authenticators' words are in there"
    for secret in secrets:
        for form in forms(secret):
            assert [file for file, text in texts.items() if form in text] == []


def test_no_secret_shows_in_what_is_told(cluster: Cluster) -> None:
    placement = ray.get_actor(placement_name(APP), NAMESPACE)
    told = [
        cluster.moe.stats(),
        endpoints(),
        described(shadow_name(APP)),
        vars(cluster.moe._session),
        cluster.moe.service,
    ]
    told += [ray.get(placement.fingerprint.remote(), timeout=60), *(described(worker_name(APP, d)) for d in DEVICES)]
    text = "\n".join(repr(one) for one in told).encode()
    assert [secret for secret in noted_secrets(cluster.secrets) if any(form in text for form in forms(secret))] == []
