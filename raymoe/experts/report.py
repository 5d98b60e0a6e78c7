"""What a worker says of itself.

Light to import: whoever reads an answer of a worker in another process imports what describes it, and the placement
actor, whom everybody asks, shall not wait for seconds for libraries that it has no use for.
"""

from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker says of itself; sizes in bytes.

    Attributes:
        resident_count: experts that need no load, or are on their way; ``resident`` names them as (layer, expert),
            where that was asked for.
        slot_count: slots; None where experts are computed in host memory.
        refused_clients: connections that its sockets did not let in; 0 for a worker without any.
        shrunk: slots fewer than the budget gives, because the device had no memory for them.
        prefetches, prefetches_used, prefetches_wasted, prefetches_late, link_busy_s: as in ``Counters``.
    """

    name: str
    emulated_link: bool
    slot_budget_bytes: int | None
    peak_slot_bytes: int
    host_bytes: int
    owned: int
    resident_count: int
    slot_count: int | None
    resident: tuple[tuple[int, int], ...]
    calls: int
    hits: int
    misses: int
    hosted: int
    loads: int
    bytes_loaded: int
    evictions: int
    prefetches: int
    prefetches_refused: int
    prefetches_late: int
    prefetches_used: int
    prefetches_wasted: int
    link_busy_s: float
    refused_clients: int = 0
    shrunk: int = 0


class Place(IntEnum):
    """Where an expert is, as seen from one device."""

    ELSEWHERE = 0
    HOST = 1
    LOADING = 2
    READY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyMap:
    """One device's experts, a byte each, layer by layer.

    Attributes:
        place: ``Place`` of every expert [L * E].
        use: uses lately, from 0 to 255, which stands for ``use_max``.
        score: what keeping it is worth by gate score and use, from 0 to 255, which stands for ``score_max``.
    """

    layers: int
    experts: int
    place: bytes
    use: bytes
    use_max: float
    score: bytes
    score_max: float
