"""One Ray node of this machine, started for a cluster and ended with all that it started: a host's part of ``up``.

`ray stop` ends every Ray process of a machine, other clusters' too. So a node runs as `ray start --block`, of which we
note the process; ending that ends the node, and nothing else.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from raymoe.errors import ConfigError, StartError
from raymoe.hosts.spec import Farewell, NodeSpec, folder_of
from raymoe.whole_file import write_whole

LOOK_S = 0.5
REACH_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 20.0  # of one attempt; where Ray gives up joining is far later
LOG_LINES = 5  # of a node that has ended, told with the error
KILL_S = 5.0
PRIVATE = 0o600  # mode of a file that only its owner reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A started node, as it is remembered: which process, since when (a number may be another's today), doing what."""

    pid: int
    created_s: float
    spec: dict[str, Any]

    def process(self) -> psutil.Process | None:
        """The node's process while it runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_s) < 1 and process.status() != psutil.STATUS_ZOMBIE
            return process if same else None
        except psutil.NoSuchProcess:
            return None


def start_node(spec: NodeSpec) -> str:
    """Start the node and wait until the cluster has it. Where it runs already, nothing is done.

    Returns what was done. Raises ConfigError where it runs with other settings, StartError where it does not start.
    """
    record = read_record(spec.cluster, spec.host.name)
    if record is not None and record.process() is not None:
        if record.spec != spec.without_token():
            raise ConfigError("runs with other settings than the file's; `raymoe down` the cluster first")
        return "runs already"
    folder = folder_of(spec.cluster)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(token_file(spec.cluster), spec.token, PRIVATE)
    write_whole(folder / "env", shell_lines(spec), PRIVATE)
    reach_head(spec)
    log = folder / f"{spec.host.name}.log"
    process = spawn(spec, log)
    created_s = psutil.Process(process.pid).create_time()
    write_record(spec, Record(pid=process.pid, created_s=created_s, spec=spec.without_token()))
    try:
        wait_until_joined(spec, process, log)
    except BaseException:
        stop_node(Farewell(cluster=spec.cluster, host=spec.host.name, timeout_s=spec.timeout_s))
        raise
    return "started"


def stop_node(farewell: Farewell) -> str:
    """End the node with all that it started; returns what was done. Raises StartError where it does not end."""
    record = read_record(farewell.cluster, farewell.host)
    process = record.process() if record is not None else None
    if process is not None:
        family = [process, *process.children(recursive=True)]
        process.terminate()  # `ray start --block` ends its own then
        _, alive = psutil.wait_procs(family, timeout=min(farewell.timeout_s, 30.0))
        for other in alive:
            other.kill()
        _, alive = psutil.wait_procs(alive, timeout=KILL_S)
        if alive:
            raise StartError(f"processes {', '.join(str(each.pid) for each in alive)} do not end; end them by hand")
    record_file(farewell.cluster, farewell.host).unlink(missing_ok=True)
    return "ended" if process is not None else "did not run"


# --- starting -----------------------------------------------------------------------------------------------


def ray_command(spec: NodeSpec) -> list[str]:
    """`ray start` for this node."""
    host = spec.host
    cpus = host.num_cpus if host.num_cpus is not None else (None if spec.is_head else 0)
    options: dict[str, Any] = {
        "node-ip-address": host.address,
        "labels": ",".join(f"{key}={value}" for key, value in {**host.labels, "host": host.name}.items()),
        "object-store-memory": host.object_store_memory,
        "num-cpus": cpus,
        "num-gpus": host.num_gpus,
        "resources": json.dumps(host.resources) if host.resources else None,
    }
    if spec.is_head:
        options |= {"port": spec.head.rpartition(":")[2], "include-dashboard": "false"}
    else:
        options["address"] = spec.head
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    head = ["--head"] if spec.is_head else []
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *head, *flags]


def spawn(spec: NodeSpec, log: Path) -> "subprocess.Popen[bytes]":
    """Start the node in a session of its own, so that it outlives whoever asked for it."""
    with log.open("wb") as out:
        return subprocess.Popen(
            ray_command(spec),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path.home(),
            env=os.environ | environment(spec),
        )


def reach_head(spec: NodeSpec) -> None:
    """Raise StartError where the head's port can't be reached from here, before Ray waits for it in vain."""
    if spec.is_head:
        return
    try:
        connect_head(spec)
    except OSError as error:
        raise StartError(
            f"does not reach the head at {spec.head} within {REACH_TIMEOUT_S:g} s ({error}); "
            "is that address the head's in their common network, and no firewall between?"
        ) from error


def connect_head(spec: NodeSpec) -> None:
    """Raises OSError where nobody listens at the head's port."""
    address, _, port = spec.head.rpartition(":")
    socket.create_connection((address.strip("[]"), int(port)), REACH_TIMEOUT_S).close()


def wait_until_joined(spec: NodeSpec, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the cluster lists this address as alive. Raises StartError with the end of the node's log."""
    end = time.monotonic() + spec.timeout_s
    while not is_member(spec):
        if process.poll() is not None:
            raise StartError(f"Ray ended with status {process.returncode}: {last_lines(log)} (all of it: {log})")
        if time.monotonic() > end:
            raise StartError(f"has not joined the cluster within {spec.timeout_s:g} s (timeout_s); see {log}")
        time.sleep(LOOK_S)


def is_member(spec: NodeSpec) -> bool:
    """Ask the cluster, in a process of its own: a failed attempt to join leaves Ray in a state of its own."""
    try:
        connect_head(spec)
    except OSError:
        return False
    look = "import sys, ray; ray.init(sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)"
    check = "sys.exit(not any(n['Alive'] and n['NodeManagerAddress'] == sys.argv[2] for n in ray.nodes()))"
    command = [sys.executable, "-c", f"{look}; {check}", spec.head, spec.host.address]
    try:
        done = subprocess.run(command, env=os.environ | environment(spec), capture_output=True, timeout=JOIN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def environment(spec: NodeSpec) -> dict[str, str]:
    """Of the node, and of whoever joins the cluster on this host."""
    return {
        "RAY_ADDRESS": spec.head,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file(spec.cluster)),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def shell_lines(spec: NodeSpec) -> str:
    """The environment as a shell reads it."""
    return "".join(f"export {name}='{value}'\n" for name, value in environment(spec).items())


# --- what is remembered -------------------------------------------------------------------------------------


def record_file(cluster: str, host: str) -> Path:
    """Where a started node is noted."""
    return folder_of(cluster) / f"{host}.json"


def token_file(cluster: str) -> Path:
    """Where this host keeps the cluster's token."""
    return folder_of(cluster) / "token"


def read_record(cluster: str, host: str) -> Record | None:
    """The started node; None where none was, or the note is damaged (its node then runs on, and its port is taken)."""
    try:
        return Record(**json.loads(record_file(cluster, host).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_record(spec: NodeSpec, record: Record) -> None:
    """Note a started node."""
    write_whole(record_file(spec.cluster, spec.host.name), json.dumps(asdict(record)), PRIVATE)


def last_lines(log: Path) -> str:
    """The end of a log in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-LOG_LINES:]) or "it said nothing"
