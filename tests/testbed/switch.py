"""An Ethernet switch in user space that keeps every frame for a fixed time: the delay where the kernel has no netem.

It reads the frames that come out of each host's cable and sends them on into the cable of the host that they are for.
It runs in the switch's namespace as a process of its own:

    python -m tests.testbed.switch DELAY_S INTERFACE...
"""

import collections
import ctypes
import os
import select
import signal
import socket
import sys
import time

ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23  # of linux/if_packet.h: a port must not hear what the switch itself sends
PR_SET_TIMERSLACK = 29  # of linux/prctl.h
FRAME_BYTES = 2048  # more than an Ethernet frame has; hosts hand over whole frames, see network.py
SOCKET_BUFFER_BYTES = 8 << 20
READ_AT_ONCE = 32  # frames from one port before the others, and what is due, have their turn
QUEUED = 1 << 14  # frames under way; more are lost, as in any switch


class Switch:
    """Forwards frames between ports by the addresses it has learned, each ``delay_s`` after it was read."""

    def __init__(self, interfaces: list[str], delay_s: float) -> None:
        self._delay_ns = int(delay_s * 1e9)
        self._ports = [open_port(name) for name in interfaces]
        self._port_of: dict[bytes, socket.socket] = {}
        self._under_way: collections.deque[tuple[int, socket.socket, bytes]] = collections.deque()

    def run(self) -> None:
        """Forward frames until the process is ended."""
        while True:
            wait_s = None
            if self._under_way:
                wait_s = max(0.0, (self._under_way[0][0] - time.monotonic_ns()) / 1e9)
            readable, _, _ = select.select(self._ports, [], [], wait_s)
            for port in readable:
                self._read(port)
            self._send_due()

    def _read(self, port: socket.socket) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                frame = port.recv(FRAME_BYTES)
            except (BlockingIOError, OSError):  # OSError: its cable is down
                return
            if len(self._under_way) < QUEUED:
                self._port_of[frame[6:12]] = port
                self._under_way.append((time.monotonic_ns() + self._delay_ns, port, frame))

    def _send_due(self) -> None:
        now = time.monotonic_ns()
        while self._under_way and self._under_way[0][0] <= now:
            _, source, frame = self._under_way.popleft()
            known = self._port_of.get(frame[:6])
            for port in [known] if known is not None else [port for port in self._ports if port is not source]:
                try:  # noqa: SIM105 - a context manager would cost each frame a microsecond
                    port.send(frame)
                except OSError:  # its queue is full, or its cable is down: the frame is lost
                    pass


def open_port(interface: str) -> socket.socket:
    """A raw socket that reads what comes out of ``interface``, and only that."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    port.bind((interface, ETH_P_ALL))
    port.setblocking(False)
    return port


def main() -> None:
    """Run until SIGTERM. Says "ready" once frames are forwarded."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # else the kernel may add 50 us to every wait
    switch = Switch(sys.argv[2:], float(sys.argv[1]))
    print("ready", flush=True)
    switch.run()


if __name__ == "__main__":
    main()
