"""``raymoe keys``: make and list API keys."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="keys", help="API keys of a server.", no_args_is_help=True)

KeysFile = Annotated[Path, typer.Option("--file", help="File of keys; serving.keys_file names it to the server.")]


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whom or what it is for.")],
    file: KeysFile = Path("keys.yaml"),
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Omitted: no limit.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at a time; omitted: no limit.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may change settings, too.")] = False,
) -> None:
    """Make a key, append its hash to a file, and print the key: once, for it can't be found out again.

    A running server whose file this is takes the key at once.
    """
    from raymoe.serve.key_source import add_key

    key = add_key(file, name, requests_per_minute=requests_per_minute, concurrent=concurrent, admin=admin)
    typer.echo(key)
    typer.echo(f'"{name}" was added to {file}; delete its lines there to take the key away', err=True)


@app.command("list")
def list_keys(file: KeysFile = Path("keys.yaml")) -> None:
    """Show the names and limits of the keys in a file."""
    from raymoe.serve.key_source import read_keys

    for key in read_keys(file):
        limits = [
            f"{key.requests_per_minute} per minute" if key.requests_per_minute else "any number per minute",
            f"{key.concurrent} at a time" if key.concurrent else "any number at a time",
        ]
        typer.echo(f"{key.name}: {', '.join(limits + ['admin'] * key.admin)}")
