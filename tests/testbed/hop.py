"""Round trips of messages with the sizes of an expert call, over the data plane's own sockets and nothing behind them.

    python -m tests.testbed.hop serve ADDRESS CLIENT_KEY ANSWER_SIZES           answers until its input ends
    python -m tests.testbed.hop ask REQUEST_SIZES COUNT GAP_S                   then reads on its input where and whom

It says how long a hop takes on a link, whatever the engine and the workers do.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tests.testbed.network import Host
from tests.testbed.wire import Call

WARM_UP = 20


def round_trip_s(engine: Host, worker: Host, call: Call, count: int, gap_s: float) -> float:
    """The median over ``count`` round trips between two hosts, or within one, ``gap_s`` of computing apart."""
    ask = _tool(engine, "ask", sizes(call.request), str(count), str(gap_s))
    assert ask.stdin is not None and ask.stdout is not None
    key = ask.stdout.readline().strip()
    address = worker.address if worker != engine else "127.0.0.1"
    serve = _tool(worker, "serve", address, key, sizes(call.answer))
    assert serve.stdin is not None and serve.stdout is not None
    try:
        out, _ = ask.communicate(serve.stdout.readline(), timeout=120)
        return statistics.median(json.loads(out.splitlines()[-1]))
    finally:
        for process in (ask, serve):
            with contextlib.suppress(OSError, ValueError):
                process.stdin.close()  # type: ignore[union-attr]
            process.wait(10)


def sizes(frames: Sequence[int]) -> str:
    """As one word."""
    return ",".join(str(size) for size in frames)


def _tool(host: Host, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.testbed.hop", *arguments]
    return host.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


# --- on the hosts -------------------------------------------------------------------------------------------


def serve(address: str, client_key: str, answer: list[bytes]) -> None:
    """A worker's side."""
    import zmq

    from raymoe.transport.door import AllowedClients, Door
    from raymoe.transport.frames import Limits
    from raymoe.transport.sockets import KeyPair, server_socket

    context = zmq.Context(io_threads=1)
    door = Door(context, AllowedClients({client_key.encode()}))
    keys = KeyPair.create()
    socket, endpoint = server_socket(context, address, keys, Limits())
    print(json.dumps({"endpoint": endpoint, "key": keys.public.decode()}), flush=True)
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    while not ended.is_set():
        if socket.poll(100):
            sender, *_ = socket.recv_multipart()
            socket.send_multipart([sender, *answer])
    socket.close()
    door.close()


def ask(request: list[bytes], count: int, gap_s: float) -> None:
    """An engine's side."""
    import zmq

    from raymoe.transport.frames import Limits
    from raymoe.transport.sockets import KeyPair, client_socket

    keys = KeyPair.create()
    print(keys.public.decode(), flush=True)
    where = json.loads(sys.stdin.readline())
    socket = client_socket(zmq.Context(io_threads=1), where["endpoint"], where["key"].encode(), keys, Limits())
    times = []
    for _ in range(WARM_UP + count):
        start = time.perf_counter()
        socket.send_multipart(request)
        socket.recv_multipart(copy=False)
        end = time.perf_counter()
        times.append(end - start)
        while time.perf_counter() < end + gap_s:  # computing, as the trunk does between two layers
            pass
    print(json.dumps(times[WARM_UP:]), flush=True)


def main() -> None:
    """One of the two sides."""
    tool, *arguments = sys.argv[1:]
    if tool == "serve":
        serve(arguments[0], arguments[1], buffers(arguments[2]))
    else:
        ask(buffers(arguments[0]), int(arguments[1]), float(arguments[2]))


def buffers(word: str) -> list[bytes]:
    """Frames of these sizes."""
    return [bytes(int(size)) for size in word.split(",")]


if __name__ == "__main__":
    main()
