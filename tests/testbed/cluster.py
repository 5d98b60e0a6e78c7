"""A Ray cluster on the testbed's hosts, brought up by ``raymoe up`` as anyone would."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.testbed import ssh
from tests.testbed.network import REPOSITORY, Host, Network

NAME = "lab"
UP_TIMEOUT_S = 300.0
RAYMOE = str(Path(sys.executable).with_name("raymoe"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running Ray cluster; the head is the first host."""

    network: Network
    head: Host

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command on the head that joins the cluster."""
        join = f'. ~/.raymoe/{NAME}/env && cd {REPOSITORY} && exec "$@"'
        return self.head.command(["sh", "-c", join, "sh", *argv])

    def add(self, hosts: Sequence[Host]) -> None:
        """``raymoe up`` again, with further hosts in its file."""
        on_head(self.head, "up", str(write_hosts(hosts)))

    @contextlib.contextmanager
    def serving(self, config: dict[str, Any]) -> Iterator[str]:
        """``raymoe serve`` on the head, at its address; the URL."""
        file = self.head.home / "cluster.yaml"
        file.write_text(json.dumps(config))
        command = self.command([RAYMOE, "serve", str(file), "--host", self.head.address])
        server = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert server.stdout is not None and server.stderr is not None
        try:
            if "is served at" not in server.stdout.readline():
                raise RuntimeError(f"raymoe serve did not start: {server.stderr.read()}")
            yield f"http://{self.head.address}:8000"
        finally:
            server.terminate()
            server.communicate(timeout=120)


@contextlib.contextmanager
def cluster(network: Network, hosts: Sequence[Host]) -> Iterator[Cluster]:
    """``raymoe up`` on these hosts, and ``raymoe down`` at the end."""
    head, file = hosts[0], write_hosts(hosts)
    try:
        on_head(head, "up", str(file))
        yield Cluster(network=network, head=head)
    finally:
        on_head(head, "down", str(file))  # as the file is then: hosts may have come


def write_hosts(hosts: Sequence[Host]) -> Path:
    """The file of hosts, in the head's home; and an ssh that reaches them."""
    home = hosts[0].home
    (home / "bin").mkdir(exist_ok=True)
    ssh.install(home / "bin")
    described: list[dict[str, Any]] = [
        {"name": host.name, "address": host.address, "object_store_memory": "80MiB"} for host in hosts
    ]
    described[0]["num_cpus"] = 2
    file = home / "hosts.yaml"
    file.write_text(json.dumps({"name": NAME, "raymoe": RAYMOE, "hosts": described}))
    return file


def on_head(head: Host, *argv: str) -> str:
    """Run ``raymoe`` on the head, with the ssh of the testbed; what it said."""
    path = f"PATH={head.home}/bin:{os.environ['PATH']}"
    return head.run("env", path, RAYMOE, *argv, timeout_s=UP_TIMEOUT_S).stdout
