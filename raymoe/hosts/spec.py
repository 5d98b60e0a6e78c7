"""What ``raymoe up`` tells a host through standard input, and what the host answers: one line of JSON each way.

Nothing of it is on a command line, where a shell could misread it and other users could see the token.
"""

import ipaddress
from pathlib import Path

from pydantic import Field

from raymoe.hosts.file import NAME, HostConfig, HostsConfig
from raymoe.strict import StrictModel


class NodeSpec(StrictModel):
    """The Ray node that a host shall run.

    Attributes:
        head: address of Ray's head, "HOST:PORT".
        token: secret of the cluster; whoever has it may run code on all hosts.
    """

    cluster: str = Field(pattern=NAME)
    host: HostConfig
    head: str
    is_head: bool
    token: str = Field(min_length=32, repr=False)
    timeout_s: float

    def without_token(self) -> dict[str, object]:
        """What is written down of it, and compared with what runs."""
        return self.model_dump(mode="json", exclude={"token", "timeout_s"})


class Farewell(StrictModel):
    """The Ray node that a host shall end."""

    cluster: str = Field(pattern=NAME)
    host: str = Field(pattern=NAME)
    timeout_s: float


class Answer(StrictModel):
    """What a host says at the end: ``did`` for people, or ``error``."""

    did: str = ""
    error: str = ""


def spec_of(config: HostsConfig, host: HostConfig, token: str) -> NodeSpec:
    """What ``host`` is told."""
    is_v6 = ipaddress.ip_address(config.head.address).version == 6
    shown = f"[{config.head.address}]" if is_v6 else config.head.address
    return NodeSpec(
        cluster=config.name,
        host=host,
        head=f"{shown}:{config.port}",
        is_head=host is config.head,
        token=token,
        timeout_s=config.timeout_s,
    )


def folder_of(cluster: str) -> Path:
    """Where a host keeps what it must remember of a cluster."""
    return Path.home() / ".raymoe" / cluster
