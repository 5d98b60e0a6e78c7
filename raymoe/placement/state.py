"""What the placement actor knows: owners, last known residency, holders of the cluster. No clock, no I/O.

Times are passed in, so that every rule here can be tested with plain numbers. All of it can be rebuilt from
the workers, which alone own their residency.
"""

from dataclasses import dataclass, field

from raymoe.placement.ownership import Ownership
from raymoe.types import DeviceName, ExpertKey

HOLD_S = 15.0  # a holder that has not renewed for so long is gone; several renewals fit in
FIRST_HOLD_S = 120.0  # a start that nobody ever took hold of is abandoned


@dataclass(slots=True)
class Holders:
    """Who keeps the cluster alive: drivers, engine replicas, ingress replicas.

    The workers of an application end when its last holder has released or has fallen silent. An engine that
    crashes does not end them, for the ingress still holds.
    """

    created_s: float
    seen_s: dict[str, float] = field(default_factory=dict)
    ever_held: bool = False
    left_unseen: bool = False

    def renew(self, holder: str, now_s: float) -> None:
        """``holder`` is alive."""
        self.seen_s[holder] = now_s
        self.ever_held = True

    def release(self, holder: str) -> None:
        """``holder`` is leaving. One that was never seen here held this actor before it was restarted."""
        if self.seen_s.pop(holder, None) is None:
            self.left_unseen = True

    def is_abandoned(self, now_s: float) -> bool:
        """Whether nobody holds the cluster any more."""
        self.seen_s = {name: seen for name, seen in self.seen_s.items() if now_s - seen <= HOLD_S}
        if self.seen_s:
            return False
        return self.ever_held or now_s - self.created_s > (HOLD_S if self.left_unseen else FIRST_HOLD_S)


@dataclass(slots=True)
class ClusterState:
    """Owners, the one that engines ask for each expert, and last known residency (expert ids per device)."""

    ownership: Ownership = field(default_factory=dict)
    primary: dict[ExpertKey, DeviceName] = field(default_factory=dict)
    resident: dict[DeviceName, set[int]] = field(default_factory=dict)

    def apply_residency(self, device: DeviceName, loaded: list[int], evicted: list[int]) -> None:
        """A worker loaded and evicted experts."""
        here = self.resident.setdefault(device, set())
        here.difference_update(evicted)
        here.update(loaded)
