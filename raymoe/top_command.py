"""``raymoe top``: the devices of a running application, looked at again and again. Ray comes in when it is asked."""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from raymoe.errors import ConfigError, StartError
from raymoe.observe.top import Look, table_of

ANSWER_TIMEOUT_S = 20.0  # the server asks every worker, and waits for one that is silent
KEY_VARIABLE = "RAYMOE_API_KEY"


def top(
    url: Annotated[
        str | None, typer.Option(help="Of a server, such as http://127.0.0.1:8000; omitted: the Ray cluster here.")
    ] = None,
    key: Annotated[str | None, typer.Option(help=f"API key for --url; better in the variable {KEY_VARIABLE}.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the application; needed if several run.")] = None,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print, and leave.")] = False,
) -> None:
    """Watch the devices of a running application: hits, slots, links, prefetches, substitutions. Ctrl-C leaves.

    Rates are of the time since the look before; with --once, which has none, of the time since the start.
    """
    if url is not None and name is not None:
        raise ConfigError("give either --url or --name; a server has one application")
    look = looks_at(url, key or os.environ.get(KEY_VARIABLE)) if url is not None else looks_here(name)
    now = look()
    console = Console()
    if once:
        console.print(table_of(now))
        return
    with Live(table_of(now), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                before, now = now, look()
                live.update(table_of(now, before), refresh=True)
        except KeyboardInterrupt:
            return


def looks_at(url: str, key: str | None) -> Callable[[], Look]:
    """Looks at a server. Raises StartError where it does not answer, and ConfigError for no URL."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f'--url is "{url}"; it must begin with http:// or https://')
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url.rstrip('/').removesuffix('/v1')}/v1/stats", headers=headers)

    def look() -> Look:
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
                return Look(stats=json.load(answer), at_s=time.monotonic())
        except urllib.error.HTTPError as error:
            raise StartError(f"{request.full_url}: {message_of(error)}") from error
        except (OSError, ValueError) as error:
            raise StartError(f"no stats from {request.full_url}: {error}") from error

    return look


def message_of(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong."""
    hint = f"; give a key with --key or {KEY_VARIABLE}" if error.code in (401, 403) else ""
    try:
        body: Any = json.load(error)
        return f"{body['error']['message']}{hint}"
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}{hint}"


def looks_here(name: str | None) -> Callable[[], Look]:
    """Looks at an application of the Ray cluster on this machine. Raises StartError where there is none."""
    import ray

    from raymoe.actors.session import cluster_status
    from raymoe.running import the_application

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise StartError(
            "no Ray cluster runs here; name a server with --url, or start an application with: raymoe serve CONFIG"
        ) from error
    app = name or the_application()
    return lambda: Look(stats=cluster_status(app, names=False).as_dict(), at_s=time.monotonic())
