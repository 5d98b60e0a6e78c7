"""A relay between a ZeroMQ client and a server that keeps what the client sent, and can send it again or falsify it.

It understands ZMTP's framing (a greeting of 64 bytes, then frames with their length before them), but has no key: what
it relays is what anybody on the way sees.
"""

import contextlib
import socket
import threading
from typing import BinaryIO

GREETING_BYTES = 64
LONG, COMMAND = 0x02, 0x04  # flags of a frame: eight bytes of length instead of one; part of a handshake
CONNECT_TIMEOUT_S = 10.0


class Tap:
    """Relays one connection to ``endpoint``; clients connect to ``address``. Use as a context manager.

    Attributes:
        greeting, frames: what the client has sent so far, whole.
        falsify: flip a bit in the next frame with a message.
    """

    def __init__(self, endpoint: str) -> None:
        self._server = _host_and_port(endpoint)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.greeting = b""
        self.frames: list[bytes] = []
        self.falsify = False
        self._up: socket.socket | None = None
        self._threads = [threading.Thread(target=self._relay, daemon=True)]
        self._threads[0].start()

    def again(self) -> None:
        """Send the client's last frame a second time, on the same connection."""
        assert self._up is not None
        self._up.sendall(self.frames[-1])

    def whole_again(self) -> None:
        """Open a connection of one's own, and send all that the client ever sent."""
        replay = socket.create_connection(self._server, timeout=CONNECT_TIMEOUT_S)
        with replay, contextlib.suppress(OSError):  # cut in the middle
            replay.sendall(self.greeting + b"".join(self.frames))
            while replay.recv(65536):
                pass

    def _relay(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            down, _ = self._listener.accept()
            self._up = up = socket.create_connection(self._server, timeout=CONNECT_TIMEOUT_S)
            up.settimeout(None)
            back = threading.Thread(target=_copy, args=(up, down), daemon=True)
            back.start()
            self._threads.append(back)
            with down, up, down.makefile("rb") as sent:
                while len(self.greeting) < GREETING_BYTES:  # both sides wait for parts of the other's
                    part = down.recv(GREETING_BYTES - len(self.greeting))
                    if not part:
                        return
                    self.greeting += part
                    up.sendall(part)
                while frame := _frame(sent):
                    self.frames.append(frame)
                    if self.falsify and not frame[0] & COMMAND:
                        frame, self.falsify = frame[:-1] + bytes([frame[-1] ^ 1]), False
                    up.sendall(frame)

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        if self._up is not None:
            with contextlib.suppress(OSError):
                self._up.shutdown(socket.SHUT_RDWR)


def _frame(sent: BinaryIO) -> bytes:
    head = sent.read(1)
    if not head:
        return b""
    head += sent.read(8 if head[0] & LONG else 1)
    return head + sent.read(int.from_bytes(head[1:], "big"))


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)
