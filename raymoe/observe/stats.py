"""What a running cluster tells of itself: plain, picklable records."""

from dataclasses import asdict, dataclass, field
from typing import Any

from raymoe.types import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStats:
    """One device. Sizes in bytes; ``resident`` counts experts that need no load, ``resident_experts`` names them.

    ``emulated_link`` marks devices whose transfers imitate a slow bus: their speeds are no hardware's.
    """

    name: str
    kind: str
    transport: str
    state: str
    node: str
    pid: int
    emulated_link: bool
    slot_budget_bytes: int | None
    peak_slot_bytes: int
    host_bytes: int
    owned: int
    resident: int
    resident_experts: tuple[tuple[int, int], ...] = field(repr=False)
    calls: int
    hits: int
    misses: int
    loads: int
    bytes_loaded: int
    evictions: int
    prefetches: int
    prefetches_refused: int
    dropped_messages: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of (row, expert) pairs whose expert was resident."""
        return Routing(hits=self.hits, misses=self.misses).hit_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's counts and totals; ``decode_s`` is time spent in decode steps."""

    model: str
    architecture: str
    dtype: str
    running: int
    waiting: int
    finished: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    kv_bytes: int
    kv_budget_bytes: int | None
    hits: int
    misses: int
    loads: int
    bytes_loaded: int
    decode_s: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStats:
    """Everything: devices by name, the engine (None where only the workers were asked), replication, policy."""

    app: str
    devices: dict[str, DeviceStats]
    engine: EngineStats | None = None
    replication: int = 1
    policy: str = "on_demand"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
