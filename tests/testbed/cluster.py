"""A Ray cluster on the testbed's hosts, brought up by ``raymoe up`` as anyone would."""

import contextlib
import json
import os
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


@contextlib.contextmanager
def cluster(network: Network, hosts: Sequence[Host]) -> Iterator[Cluster]:
    """``raymoe up`` on these hosts, and ``raymoe down`` at the end."""
    head, file = hosts[0], write_hosts(hosts)
    on_head(head, "up", str(file))
    try:
        yield Cluster(network=network, head=head)
    finally:
        on_head(head, "down", str(file))


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
