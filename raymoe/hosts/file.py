"""The file of ``raymoe up``: which machines make up a cluster, and how a command is run on one of them."""

import ipaddress
import shlex
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from raymoe.strict import Bytes, StrictModel, read_mapping, validated

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 {host} {command}"
HOST, COMMAND = "{host}", "{command}"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"  # of files and labels, too
OBJECT_STORE_BYTES = 200 << 20  # raymoe keeps little there; on boards with unified memory it would be the GPU's


class HostConfig(StrictModel):
    """One machine: how it is reached, and what its Ray node offers."""

    name: str = Field(pattern=NAME, description="What {host} in run_on becomes; also its Ray label host.")
    address: str = Field(description="Its own address that the others reach. Ray and the data plane use no other.")
    labels: dict[str, str] = Field({}, description="Ray node labels, for node_labels of a device; host is set anyway.")
    resources: dict[str, float] = Field({}, description="Ray resources, for resources of a device.")
    num_cpus: int | None = Field(
        None,
        ge=0,
        description="CPUs that Ray counts; Serve puts the engine where there are some. "
        "Omitted: all of the first host's, none of the others'.",
    )
    num_gpus: int | None = Field(None, ge=0, description="GPUs; omitted: as Ray counts them, which finds no Jetson's.")
    object_store_memory: Bytes = Field(OBJECT_STORE_BYTES, ge=80 << 20, description="Memory of Ray's object store.")

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        address = ipaddress.ip_address(value)  # its ValueError says what is wrong
        if address.is_loopback or address.is_unspecified:
            raise ValueError(f"{value} can't be reached by other machines; give the address in their network")
        return value


class HostsConfig(StrictModel):
    """A whole cluster of plain machines. The first host is Ray's head."""

    name: str = Field("raymoe", pattern=NAME, description="Of the cluster; several may share machines.")
    run_on: str = Field(SSH, description="Command that runs {command} on {host} and hands its own input on.")
    raymoe: str = Field("raymoe", description="How raymoe is called on the hosts, such as a path; no spaces within.")
    port: int = Field(
        6379, ge=1024, le=65535, description="Of Ray's head; anyone who has the token may run code by it."
    )
    timeout_s: float = Field(120.0, gt=0, le=3600, description="Longest wait for one host to start, or to end.")
    hosts: list[HostConfig] = Field(min_length=1, description="The machines; the first one is the head.")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML file. Raises ConfigError that names the file and every wrong field."""
        return validated(cls, read_mapping(path, "hosts file", "hosts"), str(path))

    @field_validator("run_on")
    @classmethod
    def _names_both(cls, value: str) -> str:
        words = shlex.split(value)
        if COMMAND not in words or not any(HOST in word for word in words):
            raise ValueError(f'"{value}" must have {HOST} and, as a word of its own, {COMMAND}, as in "{SSH}"')
        return value

    @field_validator("raymoe")
    @classmethod
    def _is_one_word(cls, value: str) -> str:
        if not value or value.split() != [value]:
            raise ValueError(f'"{value}" must be one word: shells on the way would split it')
        return value

    @model_validator(mode="after")
    def _are_different(self) -> Self:
        for field in ("name", "address"):
            values = [getattr(host, field) for host in self.hosts]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"hosts must differ in {field}; twice there: {', '.join(twice)}")
        return self

    @property
    def head(self) -> HostConfig:
        """The first host."""
        return self.hosts[0]

    def command_on(self, host: str, command: list[str]) -> list[str]:
        """What to execute here so that ``command``, words without spaces or quotes, runs on ``host``."""
        words: list[str] = []
        for word in shlex.split(self.run_on):
            words += command if word == COMMAND else [word.replace(HOST, host)]
        return words
