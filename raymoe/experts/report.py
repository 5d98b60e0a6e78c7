"""What a worker says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker says of itself; sizes in bytes, ``resident`` as (layer, expert)."""

    name: str
    emulated_link: bool
    slot_budget_bytes: int | None
    peak_slot_bytes: int
    host_bytes: int
    owned: int
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
