"""``raymoe probe``: measures this machine for ``raymoe plan``. torch comes in only when it runs.

Each figure is the best of some rounds: other work can only make a machine look slower than it is.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from raymoe.errors import ConfigError, StartError
from raymoe.observe import terminal
from raymoe.whole_file import write_whole

ROUNDS = 5
ARRAY_BYTES = 256 * 2**20  # far beyond any cache
EDGE = 1024  # of the matrices that are multiplied: 2 billion operations
CHUNK_BYTES = 2**20  # that a listener takes at once; what it throws away needs no memory
BULK_BYTES = 16 * 2**20
MOST_BYTES = 64 * 2**20  # that a peer may announce
TIMEOUT_S = 20.0
LENGTH = struct.Struct("<Q")  # bytes that follow; when all are there, one comes back
MODULES, OPERATIONS = 20, 40  # of a layer in Python, docs/benchmarks.md, "decode"

Clock = Callable[[], float]


def probe(
    name: Annotated[str, typer.Option(help="Name of the device in the entry.")] = "this",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write a devices file with this one.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Answer one probe of another machine's --peer, and leave.")
    ] = None,
    peer: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure the network to a machine that listens.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Measure this machine: memory, link into a GPU, arithmetic, software per layer, and round trips.

    Prints an entry for the devices file of `raymoe plan`. With a GPU the entry is the GPU's, its link the way from
    pinned host memory. For the network between two machines run `raymoe probe --listen 192.0.2.1:7000` on one and
    `--peer 192.0.2.1:7000` on the other; without --peer the network is this machine's loopback, and says so.
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no directory {output.absolute().parent}")
    if listen is not None:
        with listening(*address(listen, "--listen")) as (server, _):
            typer.echo(f"listening at {listen} for one probe", err=True)
            answer_one(server)
        return
    there = None if peer is None else address(peer, "--peer")
    with terminal.Progress() as progress:
        found = measure(name, there, progress.stage)
    if output is not None:
        write_whole(output, yaml.safe_dump(found, sort_keys=False))
    typer.echo(json.dumps(found, indent=2) if as_json else yaml.safe_dump(found, sort_keys=False).rstrip())
    if peer is None:
        typer.echo("network: of the loopback only; use --peer for that between machines", err=True)


def measure(name: str, there: tuple[str, int] | None, on_stage: Callable[[str], None]) -> dict[str, Any]:
    """A devices file as a mapping, with one device and the network."""
    on_stage("loading torch")
    import psutil
    import torch

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if has_gpu else "cpu")
    on_stage("memory")
    available = int(psutil.virtual_memory().available)
    entry: dict[str, Any] = {"name": name}
    if has_gpu:
        entry["memory"] = int(torch.cuda.mem_get_info(device)[0])
        entry["host_memory"] = round(0.8 * available)
        on_stage("link")
        entry["link"] = link(torch, device)
    else:
        entry["memory"] = round(0.8 * available)
        entry["unified"] = True
    on_stage("arithmetic")
    entry["compute"] = {
        "flops": round(flops(torch, device)),
        "bytes_per_s": round(memory_bytes_per_s(torch, device)),
    }
    on_stage("software")
    entry["overhead_s"] = round(software_s(torch, device), 7)
    on_stage("network")
    return {"devices": [entry], "network": network(there)}


# --- arithmetic -----------------------------------------------------------------------------------------


def best_s(
    task: Callable[[], object], sync: Callable[[], None], rounds: int = ROUNDS, clock: Clock = time.perf_counter
) -> float:
    """Seconds of the fastest of some rounds, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        sync()
        begin_s = clock()
        task()
        sync()
        times.append(clock() - begin_s)
    return max(1e-9, min(times[1:]))


def _sync(torch: Any, device: Any) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def memory_bytes_per_s(torch: Any, device: Any) -> float:
    """At which weights are read: a sum over an array far larger than caches."""
    values = torch.ones(ARRAY_BYTES // 4, device=device)
    return ARRAY_BYTES / best_s(values.sum, _sync(torch, device))


def flops(torch: Any, device: Any) -> float:
    """Operations per second of a product, in bfloat16 on a GPU and float32 on a CPU."""
    is_gpu = device.type == "cuda"
    edge = EDGE * 4 if is_gpu else EDGE
    left = torch.ones(edge, edge, device=device, dtype=torch.bfloat16 if is_gpu else torch.float32)
    return 2.0 * edge**3 / best_s(lambda: left @ left, _sync(torch, device))


def link(torch: Any, device: Any) -> dict[str, Any]:
    """From pinned host memory into the GPU: rate of large copies, seconds of a tiny one."""
    large = torch.ones(ARRAY_BYTES // 4, pin_memory=True)
    there = torch.empty_like(large, device=device)
    sync = _sync(torch, device)
    large_s = best_s(lambda: there.copy_(large, non_blocking=True), sync)
    tiny_s = best_s(lambda: there[:16].copy_(large[:16], non_blocking=True), sync, 50)
    return {"bytes_per_s": round(ARRAY_BYTES / max(1e-9, large_s - tiny_s)), "latency_s": round(tiny_s, 7)}


def software_s(torch: Any, device: Any) -> float:
    """What Python takes for a layer of a trunk: so many modules and operations, on next to nothing."""
    modules = torch.nn.ModuleList(torch.nn.Linear(16, 16, device=device) for _ in range(MODULES))
    row = torch.ones(1, 1, 16, device=device)

    def layer() -> None:
        state = row
        for module in modules:
            state = module(state)
            for _ in range(OPERATIONS // MODULES):
                state = state.view(1, 16).reshape(1, 1, 16) * 0.5

    with torch.inference_mode():
        return best_s(layer, _sync(torch, device), 50)


# --- network --------------------------------------------------------------------------------------------


def network(there: tuple[str, int] | None) -> dict[str, Any]:
    """Rate and one-way time to a peer that listens; without one, to a thread of this process.

    Raises StartError where the peer does not answer.
    """
    if there is not None:
        return to_peer(there)
    with listening("127.0.0.1", 0) as (server, port):
        thread = threading.Thread(target=answer_one, args=(server,), daemon=True)
        thread.start()
        found = to_peer(("127.0.0.1", port))
        thread.join(timeout=TIMEOUT_S)
    return found


def to_peer(there: tuple[str, int], rounds: int = 50) -> dict[str, Any]:
    """Send a byte that comes back, then bulk that does not."""
    bulk = bytes(BULK_BYTES)
    try:
        with socket.create_connection(there, timeout=TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def send(payload: bytes) -> None:
                connection.sendall(LENGTH.pack(len(payload)) + payload)
                receive(connection, 1)

            turn_s = best_s(lambda: send(b"?"), lambda: None, rounds)
            bulk_s = best_s(lambda: send(bulk), lambda: None)
    except OSError as error:
        raise StartError(
            f"--peer {there[0]}:{there[1]} does not answer ({error}); start `raymoe probe --listen` there first"
        ) from error
    rate = round(len(bulk) / max(1e-9, bulk_s - turn_s))
    return {"bytes_per_s": rate, "latency_s": round(turn_s / 2, 7)}


@contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, int]]:
    """A socket that listens. Raises StartError where it can't."""
    try:
        server = socket.create_server((host, port))
    except OSError as error:
        raise StartError(f"can't listen at {host}:{port}: {error}; choose an address of this machine") from error
    with server:
        yield server, server.getsockname()[1]


def answer_one(server: socket.socket) -> None:
    """Answer one connection until it ends. What announces too much is hung up on."""
    connection, _ = server.accept()
    with connection:
        connection.settimeout(TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while True:
                (count,) = LENGTH.unpack(receive(connection, LENGTH.size))
                if count > MOST_BYTES:
                    return
                for start in range(0, count, CHUNK_BYTES):
                    receive(connection, min(CHUNK_BYTES, count - start))
                connection.sendall(b"!")
        except OSError:  # the other side has left, or is silent
            return


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes. Raises ConnectionError where the other side leaves before."""
    buffer = bytearray(count)
    view, done = memoryview(buffer), 0
    while done < count:
        got = connection.recv_into(view[done:])
        if not got:
            raise ConnectionError("the connection ended")
        done += got
    return bytes(buffer)


def address(text: str, option: str) -> tuple[str, int]:
    """HOST:PORT. Raises ConfigError."""
    host, separator, port = text.rpartition(":")
    if not (separator and host and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f'{option} is "{text}"; write HOST:PORT, such as 192.0.2.1:7000')
    return host.strip("[]"), int(port)
