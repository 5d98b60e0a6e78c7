"""The link from host memory: its rate by the size of a transfer, pinned, pageable, in pieces, and beside computing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.device.timing import seconds
from raymoe.experts.cuda_loader import PIECE_BYTES, WINDOW

SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 23, 9_437_184, 1 << 25, 1 << 28)
LARGEST = SIZES[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimes:
    """Bytes per second.

    Attributes:
        pinned, pageable: by bytes of a transfer.
        in_pieces: of experts moved piece by piece, as prefetches are.
        beside_compute: of whole experts while matrix products keep the device's memory busy.
        latency_s: what a transfer takes beside its bytes.
        device: of reading the device's own memory.
    """

    pinned: dict[int, float]
    pageable: dict[int, float]
    in_pieces: float
    beside_compute: float
    latency_s: float
    device: float

    @property
    def peak(self) -> float:
        """Of pinned transfers."""
        return max(self.pinned.values())


def measure(pinned: torch.Tensor, expert_bytes: int, device: torch.device) -> LinkTimes:
    """``pinned``: uint8, a GB of host memory that the device reads by itself."""
    target = torch.empty(LARGEST, dtype=torch.uint8, device=device)
    pageable = torch.ones(LARGEST, dtype=torch.uint8)

    def rate(source: torch.Tensor, size: int, move: Callable[[torch.Tensor, torch.Tensor], object]) -> float:
        count = max(3, min(200, (1 << 29) // size))
        places = max(1, source.numel() // size)
        step = lambda i: move(source[i % places * size :][:size], target[:size])  # noqa: E731
        step(0)
        return size / seconds(step, count)

    whole = lambda source, place: place.copy_(source, non_blocking=True)  # noqa: E731

    def in_pieces(source: torch.Tensor, place: torch.Tensor) -> None:
        for part, where in zip(source.split(PIECE_BYTES), place.split(PIECE_BYTES), strict=True):
            where.copy_(part, non_blocking=True)
            torch.cuda.Event().record()

    rates = {size: rate(pinned, size, whole) for size in SIZES}
    small = SIZES[3]
    return LinkTimes(
        pinned=rates,
        pageable={size: rate(pageable, size, whole) for size in SIZES[2:]},
        in_pieces=rate(pinned, expert_bytes, in_pieces),
        beside_compute=beside_compute(pinned, expert_bytes, device),
        latency_s=max(0.0, small / rates[small] - small / max(rates.values())),
        device=device_rate(device),
    )


def beside_compute(pinned: torch.Tensor, expert_bytes: int, device: torch.device) -> float:
    """Bytes per second of whole experts, WINDOW deep in their stream, while products read memory all the time."""
    assert WINDOW > 0
    target = torch.empty((4, expert_bytes), dtype=torch.uint8, device=device)
    matrices = [torch.randn((8192, 8192), device=device, dtype=torch.bfloat16) for _ in range(4)]
    vector = matrices[0][0].clone()
    stream = torch.cuda.Stream()
    count = min(48, pinned.numel() // expert_bytes)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    for number in range(100):
        torch.mv(matrices[number % 4], vector)
    with torch.cuda.stream(stream):
        begin.record()
        for number in range(count):
            target[number % 4].copy_(pinned[number * expert_bytes :][:expert_bytes], non_blocking=True)
        end.record()
    while not end.query():
        for number in range(40):
            torch.mv(matrices[number % 4], vector)
    torch.cuda.synchronize()
    return count * expert_bytes / (begin.elapsed_time(end) / 1e3)


def device_rate(device: torch.device) -> float:
    """Bytes per second that a large copy within the device reads and writes."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda _: target.copy_(source), 10)
