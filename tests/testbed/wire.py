"""What expert calls cost on a wire: bytes of each layer of the protocol, and what a link adds to the time of a token.

Only arithmetic. Sizes in bytes; R rows, P pairs of row and expert, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

HEADER_BYTES = 64  # raymoe's own, see transport/frames.py
INDEX_BYTES = 4  # an expert, or a row, of one pair
TIMES_BYTES = 8  # an answer's load and computing time
CURVE_BYTES = 33  # of each frame: "MESSAGE" with its length 8, nonce 8, authenticator 16, flags 1 (ZMTP 3.1 CURVE)
SHORT_FRAME, SHORT_BYTES, LONG_BYTES = 255, 2, 9  # ZMTP: flags and a length of 1 or 8
SEGMENT_BYTES = 1448  # of TCP in an Ethernet frame of 1500: less IPv4's 20, TCP's 20 and its time stamps' 12
PACKET_BYTES = 66  # those 52, and Ethernet's 14, as the kernel's counters count
PREAMBLE_BYTES = 24  # Ethernet's preamble, checksum and gap: they take time on a wire, and no counter sees them


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The sizes of one expert call and its answer."""

    rows: int
    pairs: int
    hidden: int
    element_bytes: int = 4

    @property
    def request(self) -> tuple[int, ...]:
        """Frames from engine to worker."""
        indices = INDEX_BYTES * self.pairs
        return (HEADER_BYTES, self.rows * self.hidden * self.element_bytes, indices, indices)

    @property
    def answer(self) -> tuple[int, ...]:
        """Frames from worker to engine; of a worker whose slots did not change."""
        return (HEADER_BYTES, self.pairs * self.hidden * self.element_bytes, TIMES_BYTES)


def stream_bytes(frames: Sequence[int]) -> int:
    """A ZeroMQ message with CURVE, as TCP carries it."""
    return sum(frame_bytes(size + CURVE_BYTES) for size in frames)


def frame_bytes(size: int) -> int:
    """One ZMTP frame."""
    return size + (SHORT_BYTES if size <= SHORT_FRAME else LONG_BYTES)


def packets(frames: Sequence[int]) -> int:
    """Full TCP segments of a message, and what is left over."""
    return -(-stream_bytes(frames) // SEGMENT_BYTES)


def acknowledgements(frames: Sequence[int]) -> int:
    """Packets the receiver sends only to confirm: one for each two segments, the rest travels with its next message."""
    return packets(frames) // 2


def link_bytes(call: Call) -> tuple[int, int]:
    """(engine to worker, worker to engine): what interfaces count for one call and its answer."""
    there = stream_bytes(call.request) + PACKET_BYTES * (packets(call.request) + acknowledgements(call.answer))
    back = stream_bytes(call.answer) + PACKET_BYTES * (packets(call.answer) + acknowledgements(call.request))
    return there, back


@dataclass(frozen=True, slots=True, kw_only=True)
class Cable:
    """A way between two hosts, as it was ordered: the rate of each of its two cables, and one delay."""

    bits_per_s: float
    delay_s: float

    def message_s(self, frames: Sequence[int]) -> float:
        """From the first bit sent to the last received: the delay, the whole message on the first cable, and its last
        packet once more on the second, for the switch hands packets on as they come."""
        count = packets(frames)
        rest = stream_bytes(frames) - (count - 1) * SEGMENT_BYTES
        overhead = PACKET_BYTES + PREAMBLE_BYTES
        whole = stream_bytes(frames) + count * overhead
        return self.delay_s + 8 * (whole + rest + overhead) / self.bits_per_s

    def call_s(self, call: Call) -> float:
        """There and back, without what either side computes."""
        return self.message_s(call.request) + self.message_s(call.answer)
