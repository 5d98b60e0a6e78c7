"""What a running cluster tells of itself: plain, picklable records."""

from dataclasses import asdict, dataclass, field
from typing import Any

from raymoe.types import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStats:
    """One device. Sizes in bytes; ``resident`` counts experts that need no load.

    Attributes:
        state: "healthy", "suspect", "down" or "rejoining", as ``placement.health`` has it.
        reason: why it is not healthy.
        since_s: for which it has been in this state; None for a device in the engine's own process.
        restarts: new processes of it that have followed earlier ones.
        emulated_link: its transfers imitate a slow bus: their speeds are no hardware's.
        resident_experts: names of the resident ones as (layer, expert); empty where only their number was asked for.
        slot_count: None where experts are computed in host memory.
        prefetches, prefetches_used, prefetches_wasted: loads begun ahead of need; those that a call then asked for, and
            those that left before any did. ``prefetches_late`` were ordered, but never begun.
        link_busy_s: seconds for which loads kept the link busy, since the start.
        substituted: (token, expert) pairs of the router that were this device's and gave way to others.
        heartbeat_age_s: since it was last heard of; None for a device in the engine's own process.
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
    hosted: int
    loads: int
    bytes_loaded: int
    evictions: int
    prefetches: int
    prefetches_refused: int
    prefetches_late: int
    dropped_messages: int = 0
    slot_count: int | None = None
    prefetches_used: int = 0
    prefetches_wasted: int = 0
    link_busy_s: float = 0.0
    substituted: int = 0
    heartbeat_age_s: float | None = None
    reason: str | None = None
    since_s: float | None = None
    restarts: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of (row, expert) pairs whose expert was resident."""
        return Routing(hits=self.hits, misses=self.misses).hit_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's counts and totals.

    Attributes:
        hits, misses, hosted, substituted: (token, expert) pairs, as in ``Routing``.
        alpha: of the requests that ask for no quality of their own; the live value where it follows a budget.
        decode_s: time spent in decode steps.
        refused_settings: why the last change of settings by Serve's ``user_config`` was not made.
        recall: share of the chosen experts that the predictor had named; None where there is none.
        lead_s: mean time by which plans made of its forecasts came before their layer; None where none did.
        drafted, accepted: a shadow's tokens that were read along, and those that the model chose too.
        drafts: whether any are: "on", or "off" and why the model can't.
        kv_bytes, kv_set_aside_bytes: that the caches of running requests take, and may come to take.
        prefix_bytes, prefixes, cached_tokens: of caches kept for prompts that begin alike, how many these are, and how
            many tokens of prompts were copied from such.
        parked: requests that wait for experts which nobody can be asked for; ``waiting`` does not count them.
        rerouted, late_answers: calls that were handed out again, and answers that nobody waited for any more.
        suspects: remote workers that the engine finds silent now.
        degraded: (token, expert) pairs whose expert nobody could be asked for, and another computed instead.
        admitted, queue_s: requests that were let in, and how long they had waited, all together.
        batch_rows, batch_tokens: requests and tokens of one of the last steps, on average.
    """

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
    hosted: int
    substituted: int
    substituted_gate_mass: float
    loads: int
    bytes_loaded: int
    alpha: float
    decode_s: float
    steps: int
    refused_settings: str | None = None
    recall: float | None = None
    drafted: int = 0
    accepted: int = 0
    drafts: str = "off"
    kv_set_aside_bytes: int = 0
    prefix_bytes: int = 0
    prefixes: int = 0
    cached_tokens: int = 0
    admitted: int = 0
    queue_s: float = 0.0
    batch_rows: float = 0.0
    batch_tokens: float = 0.0
    lead_s: float | None = None
    parked: int = 0
    rerouted: int = 0
    late_answers: int = 0
    suspects: tuple[str, ...] = ()
    degraded: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of (token, expert) pairs whose expert was resident."""
        return Routing(hits=self.hits, misses=self.misses).hit_rate

    @property
    def substituted_share(self) -> float:
        """Share of (token, expert) pairs in which another expert than the router's was computed."""
        pairs = self.hits + self.misses
        return self.substituted / pairs if pairs else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorStats:
    """What foretells routing. All but the first two are of a shadow, and 0 while it is not there.

    Attributes:
        state: "healthy", or "down": experts are then loaded when the router has named them.
        reason: why it is down.
        nbytes: of its weights.
        steps, wasted: run, and left or taken back because the model's token was another.
        guesses, right: its own next tokens, and those that the model chose too.
    """

    kind: str
    state: str
    reason: str | None = None
    node: str = ""
    pid: int = 0
    nbytes: int = 0
    steps: int = 0
    wasted: int = 0
    guesses: int = 0
    right: int = 0
    dropped_messages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsStats:
    """The settings in force that people turn while the model runs.

    Attributes:
        substitutes: whether the policy ever replaces an expert, so that alpha means something.
    """

    policy: str
    substitutes: bool
    alpha: float
    alpha_max: float
    tpot_budget_s: float | None = None

    @property
    def follows_budget(self) -> bool:
        """Whether alpha moves by itself."""
        return self.substitutes and self.tpot_budget_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStats:
    """Everything: devices by name, the engine (None where none has told its counts yet), policy, and predictor.

    Attributes:
        replication: owners that every expert has; 0 where some have none.
        repairs: how many times experts were read again, or shared anew, because devices had gone or come.
        lost_experts: (layer, expert) of those for which the devices that are there have no room.
        warnings: what is worse than it was meant to be, in words.
    """

    app: str
    devices: dict[str, DeviceStats]
    engine: EngineStats | None = None
    replication: int = 1
    policy: str = "on_demand"
    predictor: PredictorStats | None = None
    settings: SettingsStats | None = None
    repairs: int = 0
    lost_experts: tuple[tuple[int, int], ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the rates."""
        everything = asdict(self)
        for name, device in self.devices.items():
            everything["devices"][name]["hit_rate"] = device.hit_rate
        if self.settings is not None:
            everything["settings"]["follows_budget"] = self.settings.follows_budget
        if self.engine is not None:
            everything["engine"] |= {
                "hit_rate": self.engine.hit_rate,
                "substituted_share": self.engine.substituted_share,
            }
        return everything
