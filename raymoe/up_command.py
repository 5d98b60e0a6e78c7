"""``raymoe up`` and ``raymoe down``: a Ray cluster on plain machines; ``raymoe node``: a machine's own part of it."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from raymoe.errors import ConfigError, RaymoeError
from raymoe.hosts.file import HostsConfig
from raymoe.hosts.spec import Answer, Farewell, NodeSpec
from raymoe.strict import StrictModel

HostsPath = Annotated[Path, typer.Argument(metavar="HOSTS", help="The file of hosts, in YAML; see docs/edge.md.")]

node = typer.Typer(
    name="node", help="What `raymoe up` runs on each host; reads one line of JSON.", no_args_is_help=True, hidden=True
)

Request = TypeVar("Request", bound=StrictModel)


def up(hosts: HostsPath) -> None:
    """Start Ray on plain machines, over ssh or whatever else runs a command there. May be called again.

    The first host is Ray's head. Hosts that are up already are left alone, and what fails is told per host.
    """
    from raymoe.hosts.remote import up as start_all

    config = HostsConfig.load(hosts)
    start_all(config, tell)
    typer.echo(
        f"{config.name}: {len(config.hosts)} hosts are up. On {config.head.name}:\n"
        f"  . ~/.raymoe/{config.name}/env\n"
        f"  {config.raymoe} serve CONFIG"
    )


def down(hosts: HostsPath) -> None:
    """End the Ray nodes that `raymoe up` started on these hosts, and what runs on them; nothing else."""
    from raymoe.hosts.remote import down as stop_all

    config = HostsConfig.load(hosts)
    stop_all(config, tell)
    typer.echo(f"{config.name}: {len(config.hosts)} hosts are down")


@node.command()
def start() -> None:
    """Start this host's Ray node."""
    from raymoe.hosts.node import start_node

    answer(NodeSpec, start_node)


@node.command()
def stop() -> None:
    """End this host's Ray node."""
    from raymoe.hosts.node import stop_node

    answer(Farewell, stop_node)


def answer(model: type[Request], act: Callable[[Request], str]) -> None:
    """Read a request, act, and print what came of it as the last line."""
    logging.basicConfig(level=logging.ERROR)
    try:
        reply = Answer(did=act(read_request(model, sys.stdin.readline())))
    except RaymoeError as error:
        reply = Answer(error=str(error))
    typer.echo(reply.model_dump_json())


def read_request(model: type[Request], line: str) -> Request:
    """A request of ``raymoe up``. Raises ConfigError for anything else; the line is not told, it has a token."""
    from pydantic import ValidationError

    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        fields = ", ".join(
            sorted({".".join(str(part) for part in item["loc"]) or "(whole)" for item in error.errors()})
        )
        raise ConfigError(f"not a request of this release of raymoe ({fields}); is it the same on all hosts?") from None


def tell(host: str, did: str) -> None:
    """One line per host."""
    typer.echo(f"{host}: {did}")
