"""What a simulation found, in figures and in words."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """One device: shares of the time in which its link and its processor were in use."""

    name: str
    link: float
    compute: float
    loads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """A run of some decode steps, the first ones left out.

    Attributes:
        tpot_s, ttft_s: seconds per output token, and to the first one.
        hit_rate: share of (token, expert) pairs that were ready when their call came.
        planned: share of the pairs that a plan had named in time; None without a shadow.
        accepted: share of the drafts that were right; None without drafts.
        tokens_per_pass: positions gained per pass.
        loads_per_token, bytes_per_token: over all links.
        parts: seconds per token of the main node: "main" computing, "loads" waited for, "experts" for all else.
        main, shadow, sent, received: shares of the time in which each was in use.
        devices: the workers.
        roofline_s: no run could be faster: the longer of the path with everything ready and what moved over all links.
        events: of the event loop, per step.
        emulated: whether figures of devices are imitated.
        fits: False where everything resident is more than the slots hold: a comparison then, no offer.
    """

    policy: str
    model: str
    workers: int
    steps: int
    tpot_s: float
    ttft_s: float
    hit_rate: float
    planned: float | None
    accepted: float | None
    tokens_per_pass: float
    substituted: float
    hosted: float
    loads_per_token: float
    bytes_per_token: float
    parts: dict[str, float]
    main: float
    shadow: float | None
    sent: float
    received: float
    devices: tuple[DeviceUse, ...]
    roofline_s: float
    events_per_step: float
    emulated: bool
    fits: bool = True

    @property
    def tokens_per_s(self) -> float:
        """In decode."""
        return 1 / self.tpot_s

    @property
    def of_roofline(self) -> float:
        """How much of the roofline's speed was reached."""
        return self.roofline_s / self.tpot_s

    @property
    def bottleneck(self) -> str:
        """What the main node spent most of its time on, or what kept whoever it waited for."""
        part = max(self.parts, key=lambda name: self.parts[name])
        busiest = max(self.devices, key=lambda device: device.link)
        if part == "main":
            return "main node: computing"
        if part == "experts":
            busy = max(self.devices, key=lambda device: device.compute)
            if busy.compute < max(self.sent, self.received):
                return f"main node: network, {max(self.sent, self.received):.0%} in use"
            return "workers: messages and computing of experts that are ready"
        if self.shadow is not None and self.shadow > max(0.9, busiest.link):
            return f"shadow: computing, {self.shadow:.0%} of the time"
        return f"loads: link of {busiest.name} in use for {busiest.link:.0%} of the time"

    def as_dict(self, most_devices: int | None = None) -> dict[str, Any]:
        """For JSON; seconds and shares."""
        facts = asdict(self)
        facts |= {
            "tokens_per_s": self.tokens_per_s,
            "bottleneck": self.bottleneck,
            "of_roofline": self.of_roofline,
        }
        if most_devices is not None:
            facts["devices"] = facts["devices"][:most_devices]
        return facts
