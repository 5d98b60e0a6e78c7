"""Small tools that run inside a host's namespace; light to import, for each is a process of its own.

python -m tests.testbed.probe offload INTERFACE...     frames as a real cable carries them, from now on
python -m tests.testbed.probe ping ADDRESS COUNT       seconds of each round trip, one a line
"""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
import time

SIOCETHTOOL = 0x8946
SWITCHES = (0x17, 0x19, 0x1F, 0x24, 0x2C)  # of linux/ethtool.h: set tx checksums, scatter-gather, TSO, GSO, GRO
ECHO_REQUEST, ECHO_REPLY = 8, 0
PING_TIMEOUT_S = 1.0
PING_GAP_S = 0.002  # as long as a decode step is apart from the next


def switch_off_offload(interface: str) -> None:
    """Let the kernel cut messages into frames and write their checksums before this interface, not after it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for switch in SWITCHES:
            value = ctypes.create_string_buffer(struct.pack("II", switch, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            with contextlib.suppress(OSError):  # of those that follow from another
                fcntl.ioctl(control, SIOCETHTOOL, request)


def round_trips_s(address: str, count: int) -> list[float]:
    """ICMP echoes, which the other host's kernel answers. A lost one is left out."""
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as echo:
        echo.settimeout(PING_TIMEOUT_S)
        for number in range(1, count + 1):
            start = time.perf_counter()
            echo.sendto(echo_request(os.getpid() & 0xFFFF, number), (address, 0))
            if was_answered(echo, number, start + PING_TIMEOUT_S):
                times.append(time.perf_counter() - start)
            time.sleep(PING_GAP_S)
    return times


def echo_request(identity: int, number: int) -> bytes:
    """One request of 64 bytes after the IP header."""
    packet = struct.pack("!BBHHH56x", ECHO_REQUEST, 0, 0, identity, number)
    return packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]


def checksum(packet: bytes) -> int:
    """RFC 1071's sum."""
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def was_answered(echo: socket.socket, number: int, deadline: float) -> bool:
    """Read until the answer to this request."""
    while time.perf_counter() < deadline:
        try:
            packet = echo.recv(256)
        except (TimeoutError, OSError):
            return False
        kind, identity, found = struct.unpack("!B3xHH", packet[20:28])
        if (kind, identity, found) == (ECHO_REPLY, os.getpid() & 0xFFFF, number):
            return True
    return False


def main() -> None:
    """One of the tools above."""
    tool, *arguments = sys.argv[1:]
    if tool == "offload":
        for interface in arguments:
            switch_off_offload(interface)
        return
    for seconds in round_trips_s(arguments[0], int(arguments[1])):
        print(f"{seconds:.9f}")


if __name__ == "__main__":
    main()
