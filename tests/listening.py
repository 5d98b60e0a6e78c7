"""Which process listens where, as the kernel tells it."""

import ipaddress
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LISTEN = "0A"
SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A TCP socket that takes connections."""

    pid: int
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        address = ipaddress.ip_address(self.address)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listeners(pids: Iterable[int]) -> list[Listener]:
    """Of these processes. One that ends meanwhile has none."""
    owner = {inode: pid for pid in pids for inode in _sockets(pid)}
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[9]) in owner:
                address, _, port = fields[1].partition(":")
                pid = owner[int(fields[9])]
                found.append(Listener(pid=pid, address=_address(address), port=int(port, 16)))
    return found


def _sockets(pid: int) -> list[int]:
    inodes = []
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    for name in names:
        try:
            match = SOCKET.fullmatch(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
        if match is not None:
            inodes.append(int(match[1]))
    return inodes


def _address(text: str) -> str:
    """The kernel writes words of the machine's own order."""
    raw = b"".join(struct.pack("=I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8))
    return str(ipaddress.ip_address(raw))
