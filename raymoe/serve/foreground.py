"""An application in the foreground: start what is missing, serve until told to stop, end what was started."""

import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from raymoe import errors
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ClusterConfig
from raymoe.errors import ConfigError, RaymoeError, StartError

log = logging.getLogger(__name__)

WATCH_S = 2.0  # how often the running application is looked at
DRAIN_ANSWER_S = 10.0  # for the engine to say that it has drained, beyond what draining may take
ENDED = ("DEPLOY_FAILED", "DELETING")


def serve_in_foreground(
    config: ClusterConfig,
    *,
    name: str,
    host: str,
    port: int,
    on_stage: Callable[[str], None],
    on_ready: Callable[[str], None],
    verbose: bool = False,
) -> None:
    """Serve ``config`` as application ``name`` until Ctrl-C, SIGTERM, or until someone deletes it.

    At the first signal running requests go on for up to ``serving.drain_timeout_s`` and new ones are refused; at the
    second they are ended. Ray and Serve are started where none runs, and ended then. Leaving in any way deletes the
    application. Raises RaymoeError where the start fails, or the application breaks later.

    Args:
        on_stage: told of each stage of the start.
        on_ready: told the base URL once requests are answered.
        verbose: let Ray's own log lines through.
    """
    joins_cluster = ray.is_initialized() or "RAY_ADDRESS" in os.environ
    if not joins_cluster:
        on_stage(f"opening {config.model.source}")
        # a bad checkpoint should be told before Ray is started for it
        open_checkpoint(config.model.source, config.model.dtype, trust_remote_code=config.model.trust_remote_code)
    signal.signal(signal.SIGTERM, _interrupt)
    owns_serve = False
    try:
        if not ray.is_initialized():
            on_stage("joining Ray" if joins_cluster else "starting Ray")
            connect_ray(verbose)
            signal.signal(signal.SIGTERM, _interrupt)  # ray.init has put its own in place
        owns_serve = not serve_is_running()
        host, port = start_serve(host, port) if owns_serve else (host, serve_port())
        on_stage(f'starting application "{name}" on {len(config.devices)} devices')
        start_application(config, name)
        on_ready(base_url(host, port))
        watch_and_drain(name, config.serving.drain_timeout_s, on_stage)
    except KeyboardInterrupt:
        on_stage(f'stopping "{name}"')
    finally:
        end(name, owns_serve)


def connect_ray(verbose: bool = False) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names or ``ray start`` left here, else start one without dashboard."""
    level = logging.INFO if verbose else logging.ERROR
    for logger in ("ray", "ray.serve"):
        logging.getLogger(logger).setLevel(level)
    try:
        ray.init(log_to_driver=verbose, include_dashboard=False, logging_level=level)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartError(f"can't start or join Ray: {error}") from error


def ray_is_ours() -> bool:
    """Whether this process started the Ray cluster, so that it ends with ``ray.shutdown``."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def serve_is_running() -> bool:
    """Whether this Ray cluster has a Serve controller already."""
    return any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in ray.util.list_named_actors(all_namespaces=True))


def serve_port() -> int:
    """Port of the Serve instance that runs already; its HTTP options can't be changed."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "called only where Serve runs"
    return client.http_config.port


def start_serve(host: str, port: int) -> tuple[str, int]:
    """Start Serve's HTTP side. Raises ConfigError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"can't listen on {host}:{port} ({error.strerror}); choose another --port") from error
    serve.start(http_options={"host": host, "port": port})
    return host, port


def start_application(config: ClusterConfig, name: str) -> None:
    """Deploy and wait until it is healthy. Raises the RaymoeError that stopped a replica, else StartError."""
    from raymoe.serve.app import build_application

    try:
        serve.run(build_application(config), name=name, route_prefix="/")
    except RuntimeError as error:
        raise failure_of(name, str(error)) from error


def failure_of(name: str, text: str) -> RaymoeError:
    """Our own error behind a failed deployment, found in Serve's messages, else a StartError with their text."""
    application = serve.status().applications.get(name)
    deployments = application.deployments.values() if application is not None else ()
    messages = "\n".join([*(item.message for item in deployments), text])
    found = re.findall(r"raymoe\.errors\.(\w+): (.+)", messages)
    kind = getattr(errors, found[-1][0], None) if found else None
    if kind is not None:
        return kind(found[-1][1])
    last = next((line for line in reversed(messages.splitlines()) if line.strip()), text)
    return StartError(f'application "{name}" did not start: {last.strip()}')


def watch_and_drain(name: str, limit_s: float, on_stage: Callable[[str], None]) -> None:
    """Watch the application until a signal comes, then let it finish what it has begun. Raises what ``watch`` does."""
    try:
        watch(name)
    except KeyboardInterrupt:
        on_stage(f'finishing what "{name}" has begun, for {limit_s:g} s at most (once more: end at once)')
        try:
            drain(name, limit_s)
        except KeyboardInterrupt:
            on_stage(f'ending "{name}" at once')
            drain(name, 0.0)


def drain(name: str, limit_s: float) -> None:
    """Let no new requests in, and those under way end; after ``limit_s`` seconds with an error.

    Raises nothing where the application can't be reached: it is about to be deleted anyway.
    """
    try:
        ended = serve.get_app_handle(name).drain.remote(limit_s).result(timeout_s=limit_s + DRAIN_ANSWER_S)
    except (RayError, RayServeException, RaymoeError, TimeoutError) as error:
        log.warning("%s could not be drained: %s", name, error)
        return
    if ended:
        log.warning("%d requests of %s took longer than %g s and were ended", ended, name, limit_s)


def watch(name: str) -> None:
    """Return when the application is gone. Raises StartError where it breaks for good or Ray ends."""
    while True:
        time.sleep(WATCH_S)
        try:
            application = serve.status().applications.get(name)
        except RayError as error:
            raise StartError(f"Ray has ended: {error}") from error
        if application is None or application.status in ENDED:
            return


def end(name: str, owns_serve: bool) -> None:
    """Delete the application, then Serve where it was started here, then leave Ray (or end it, likewise)."""
    try:
        if not ray.is_initialized():
            return
        if serve_is_running() and name in serve.status().applications:
            serve.delete(name)
        if owns_serve and not ray_is_ours():
            serve.shutdown()
    except RayError as error:
        log.warning("could not end %s cleanly: %s", name, error)
    finally:
        ray.shutdown()


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
