"""An application in the foreground: start what is missing, serve until told to stop, end what was started."""

import contextlib
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
from raymoe.checkpoint.opening import open_configured
from raymoe.config import ClusterConfig
from raymoe.errors import ConfigError, RaymoeError, StartError

log = logging.getLogger(__name__)

WATCH_S = 2.0  # how often the running application is looked at
LOOK_S = 0.1  # how often whether a signal has come
DRAIN_ANSWER_S = 10.0  # for the engine to say that it has drained, beyond what draining may take
ENDED = ("DEPLOY_FAILED", "DELETING")


class Signals:
    """SIGTERM and Ctrl-C. They interrupt a start; afterwards two are counted, so as not to break into Ray's own code.

    Attributes:
        interrupt: whether a signal raises KeyboardInterrupt.
        count: of signals so far.
    """

    def __init__(self) -> None:
        self.interrupt = True
        self.count = 0
        self.install()

    def install(self) -> None:
        """Take the signals over from whoever has them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._came)

    def came_within(self, timeout_s: float) -> bool:
        """Wait, and tell whether a signal has come."""
        end_s = time.monotonic() + timeout_s
        while not self.count and time.monotonic() < end_s:
            time.sleep(LOOK_S)
        return self.count > 0

    def _came(self, _signal: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.interrupt or self.count > 2:
            raise KeyboardInterrupt


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
        open_configured(config.model)
    signals = Signals()
    owns_serve = False
    try:
        if not ray.is_initialized():
            on_stage("joining Ray" if joins_cluster else "starting Ray")
            connect_ray(verbose)
            signals.install()  # ray.init has put its own in place
        owns_serve = not serve_is_running()
        host, port = start_serve(host, port) if owns_serve else (host, serve_port())
        on_stage(f'starting application "{name}" on {len(config.devices)} devices')
        start_application(config, name)
        on_ready(base_url(host, port))
        signals.interrupt = False
        watch(name, signals)
        if signals.count:
            limit_s = config.serving.drain_timeout_s
            on_stage(f'finishing what "{name}" has begun, for {limit_s:g} s at most (once more: end at once)')
            drain(name, limit_s, signals)
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


def drain(name: str, limit_s: float, signals: Signals) -> None:
    """Let no new requests in, and those under way end; after ``limit_s`` seconds, or another signal, with an error.

    Raises nothing where the application can't be reached: it is about to be deleted anyway.
    """
    before, end_s = signals.count, time.monotonic() + limit_s + DRAIN_ANSWER_S
    try:
        handle = serve.get_app_handle(name)
        response = handle.drain.remote(limit_s)
        while time.monotonic() < end_s:
            with contextlib.suppress(TimeoutError):
                ended = response.result(timeout_s=LOOK_S)
                break
            if signals.count > before:
                response, end_s = handle.drain.remote(0.0), time.monotonic() + DRAIN_ANSWER_S
                before = signals.count
        else:
            raise TimeoutError("no answer")
    except (RayError, RayServeException, RaymoeError, TimeoutError) as error:
        log.warning("%s could not be drained: %s", name, error)
        return
    if ended:
        log.warning("%d requests of %s were ended before their answers were complete", ended, name)


def watch(name: str, signals: Signals) -> None:
    """Return when a signal has come, or the application is gone. Raises StartError where Ray ends."""
    while not signals.came_within(WATCH_S):
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
