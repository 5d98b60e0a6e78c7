"""The devices file of ``raymoe plan`` and ``raymoe simulate``: hardware that need not exist yet.

A cluster configuration says what to start where; this file says how fast things are. Strict and immutable, as all
configuration; imports neither torch nor Ray. ``DevicesFile.devices_resolved`` fills what a device leaves out from the
table of known hardware, and counts devices out: ``{name: worker, count: 8}`` is worker-0 to worker-7.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raymoe.config import Alpha
from raymoe.planning.hardware import HARDWARE, Hardware
from raymoe.strict import Bytes, StrictModel, read_mapping, validated, within
from raymoe.types import DeviceName

MAX_DEVICES = 10_000  # more than any simulation is meant for; a slip of the keyboard shouldn't fill the memory
RESERVED = 0.1  # of a device's memory, for contexts, activations and fragments, where slot_memory is not given
OVERHEAD_S = 1.4e-3  # software per layer on a 2.5 GHz core, docs/benchmarks.md, "decode"

Seconds = Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)]
Share = Annotated[float, within(0, 1)]


class LinkSpec(StrictModel):
    """The way from a device's host memory into its slots."""

    bytes_per_s: Bytes = Field(description='Bytes per second that a large copy reaches, such as "25GB".')
    latency_s: Seconds = Field(0.0, description="Seconds added to every load.")


class ComputeSpec(StrictModel):
    """What a device computes with."""

    flops: float = Field(gt=0, allow_inf_nan=False, description="Operations per second that a large product reaches.")
    bytes_per_s: Bytes = Field(description="Bytes per second at which weights are read from its memory.")


class TimesSpec(StrictModel):
    """Measured times, each in place of what would follow from operations and bytes."""

    main_layer_s: Seconds | None = Field(None, description="The trunk's share of one MoE layer, one token.")
    head_s: Seconds | None = Field(None, description="The trunk outside of the layers, per token.")
    layer_s: Seconds | None = Field(
        None, description="A layer's experts on the workers that share them, all resident, with messages."
    )
    expert_s: Seconds | None = Field(None, description="Computing one expert for one token.")
    load_s: Seconds | None = Field(None, description="Loading one expert.")
    shadow_layer_s: Seconds | None = Field(None, description="The shadow's time per MoE layer.")
    host_expert_s: Seconds | None = Field(
        None, description="Computing one expert on the host beside the device, for host assist."
    )


class DeviceSpec(StrictModel):
    """One device, or several alike. What it leaves out comes from ``hardware``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", description="Unique; with count, of a series.")
    count: int = Field(1, ge=1, le=MAX_DEVICES, description="Devices like this: NAME-0, NAME-1, ...")
    hardware: str | None = Field(None, description="A name from the table of known hardware.")
    memory: Bytes | None = Field(None, description="Memory that it computes from.")
    host_memory: Bytes | None = Field(None, description="Host memory for its shard of experts.")
    slot_memory: Bytes | None = Field(
        None, description="Budget for slots; omitted: what trunk and shadow leave of 90% of its memory."
    )
    link: LinkSpec | None = Field(None, description="Between host memory and slots.")
    unified: bool | None = Field(
        None, description="It computes straight from host memory: no slots, no link, its shard is always resident."
    )
    compute: ComputeSpec | None = Field(None, description="Speed of computing.")
    overhead_s: Seconds | None = Field(
        None, description="Seconds of software per layer of a model that runs on it, whatever its size."
    )
    serves_experts: bool | None = Field(
        None, description="Whether it takes a shard; omitted: unless trunk or shadow run on it and others can."
    )
    times: TimesSpec = Field(default_factory=TimesSpec, description="Measured times.")
    emulated: bool = Field(False, description="Some of its figures are imitated; reports say so.")


class NetworkSpec(StrictModel):
    """What lies between devices: one port each into a switch that is no limit."""

    bytes_per_s: Bytes = Field(125_000_000, description='Per port and direction; 1 Gb/s is "125MB".')
    latency_s: Seconds = Field(2e-4, description="One way, software at both ends included.")


class PredictorSpec(StrictModel):
    """The shadow, for the policies that have one."""

    bits: Literal[16, 8, 4, 3, 2] = Field(8, description="Precision of its routed experts.")
    run_ahead: bool = Field(True, description="Go on before the model's token is known.")
    recall: Share | None = Field(None, description="Of the chosen experts it names; omitted: as measured for bits.")
    agreement: Share | None = Field(None, description="Share of its tokens that are the model's; omitted: as measured.")
    drafts: Annotated[int, within(0, 8)] = Field(8, description="Most drafted tokens that one pass verifies; 0: none.")


Curve = tuple[tuple[Share, Share], ...]
"""Hit rate by the share of a layer's experts that its slots hold: points in rising order."""


class HitRatesSpec(StrictModel):
    """Measured hit rates in place of the embedded model's."""

    lru: Curve | None = Field(None, description="Least recently used.")
    score: Curve | None = Field(None, description="Importance at alpha 0.")
    substituted: Curve | None = Field(None, description="Importance at the alpha of this file.")

    @model_validator(mode="after")
    def _rise(self) -> "HitRatesSpec":
        for name, curve in (("lru", self.lru), ("score", self.score), ("substituted", self.substituted)):
            shares = [share for share, _ in curve or ()]
            if shares != sorted(set(shares)):
                raise ValueError(f"{name}: the shares of a curve must rise, they are {shares}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device with every figure filled in. Units as in its fields' names; ``Times`` as measured, else None.

    Attributes:
        memory_bytes: what it computes from; of a unified device this is its host memory too.
        slot_bytes: budget for slots; None: what is left of its memory.
        link_bytes_per_s: None: no link, the shard is computed where it lies.
        overhead_s: software per layer.
    """

    name: DeviceName
    hardware: str | None
    memory_bytes: int
    host_bytes: int
    slot_bytes: int | None
    link_bytes_per_s: float | None
    link_latency_s: float
    flops: float
    memory_bytes_per_s: float
    overhead_s: float
    serves_experts: bool
    times: TimesSpec
    emulated: bool

    @property
    def is_unified(self) -> bool:
        """Whether its shard is always resident."""
        return self.link_bytes_per_s is None

    def load_s(self, expert_bytes: int) -> float:
        """Seconds of one load; 0 where there is nothing to load."""
        if self.times.load_s is not None:
            return self.times.load_s
        return 0.0 if self.link_bytes_per_s is None else self.link_latency_s + expert_bytes / self.link_bytes_per_s


class DevicesFile(StrictModel):
    """The whole file: devices, the network between them, and who has which part."""

    devices: tuple[DeviceSpec, ...] = Field(min_length=1, description="The devices.")
    network: NetworkSpec = Field(default_factory=NetworkSpec, description="Between them.")
    trunk: str | None = Field(None, description="Device of the trunk; omitted: the first one.")
    shadow: str | None = Field(None, description="Device of the shadow; omitted: there is none.")
    group_size: int | None = Field(
        None, ge=1, description="Workers that serve one layer without a cache; omitted: the fastest is looked for."
    )
    alpha: Alpha = Field(0.25, description="Of policies importance and joint.")
    predictor: PredictorSpec = Field(default_factory=PredictorSpec, description="The shadow's settings.")
    hit_rates: HitRatesSpec = Field(default_factory=HitRatesSpec, description="Measured, if they are.")
    context_tokens: int = Field(2048, ge=1, le=10_000_000, description="Length for which KV caches need room.")

    @property
    def trunk_device(self) -> str:
        """Who runs the trunk."""
        first = self.devices[0]
        return self.trunk or (first.name if first.count == 1 else f"{first.name}-0")

    def names(self) -> tuple[str, ...]:
        """Every device's name, counted out."""
        return tuple(name for device in self.devices for name in _counted(device))

    @model_validator(mode="after")
    def _fits_together(self) -> "DevicesFile":
        total = sum(device.count for device in self.devices)
        if total > MAX_DEVICES:
            raise ValueError(f"devices are {total:,} in all; allowed are {MAX_DEVICES:,}")
        names = self.names()
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"device names must be unique, but {', '.join(twice)} is used more than once")
        for field in ("trunk", "shadow"):
            chosen = getattr(self, field)
            if chosen is not None and chosen not in names:
                raise ValueError(f'{field} is "{chosen}", but the devices are {_some(names)}')
        for device in self.devices:
            _check_known(device)
        if not any(device.serves_experts for device in self.devices_resolved()):
            raise ValueError("no device serves experts; set serves_experts: true for one, or remove it")
        return self

    def devices_resolved(self) -> tuple[Device, ...]:
        """Every device with all its figures, counted out, in the order of the file."""
        busy = {self.trunk_device, self.shadow}
        others = any(device.serves_experts is not False for device in self.devices if set(_counted(device)) - busy)
        return tuple(
            _resolved(device, name, name not in busy or not others)
            for device in self.devices
            for name in _counted(device)
        )

    @classmethod
    def load(cls, path: str | Path) -> "DevicesFile":
        """Read a YAML file. Raises ConfigError naming the file and every wrong field."""
        file = Path(path)
        return cls.parse(read_mapping(file, "devices file", 'a list "devices"'), where=str(file))

    @classmethod
    def parse(cls, data: dict[str, Any], *, where: str = "devices file") -> "DevicesFile":
        """Validate a mapping. Raises ConfigError with one line per wrong field."""
        return validated(cls, data, where)


def _counted(device: DeviceSpec) -> list[str]:
    return [device.name] if device.count == 1 else [f"{device.name}-{index}" for index in range(device.count)]


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6:,} more" if len(names) > 6 else "")


def _check_known(device: DeviceSpec) -> None:
    """Raise ValueError where neither the device nor the table says what has to be known."""
    if device.hardware is not None and device.hardware not in HARDWARE:
        raise ValueError(
            f'device "{device.name}": hardware "{device.hardware}" is not in the table; known is '
            f"{', '.join(sorted(HARDWARE))}. Measure it with `raymoe probe`, or give its figures"
        )
    known = HARDWARE.get(device.hardware) if device.hardware else None
    if known is None:
        for field in ("memory", "compute"):
            if getattr(device, field) is None:
                raise ValueError(f'device "{device.name}" needs "{field}", or "hardware" to look it up')
    unified = _is_unified(device, known)
    if unified and (device.link is not None or device.slot_memory is not None):
        raise ValueError(f'device "{device.name}" is unified: it has neither "link" nor "slot_memory"; remove them')
    if not unified and device.link is None and known is None:
        raise ValueError(
            f'device "{device.name}" needs "link", the way from its host memory into its slots; or say '
            '"unified: true" if it computes straight from host memory'
        )
    if not unified and device.host_memory is None and known is None:
        raise ValueError(f'device "{device.name}" needs "host_memory" for its shard of experts')


def _is_unified(device: DeviceSpec, known: Hardware | None) -> bool:
    if device.unified is not None:
        return device.unified
    # a link or slots given by hand are those of a unified device's emulation
    return known is not None and known.link_bytes_per_s is None and device.link is None


def _resolved(device: DeviceSpec, name: str, may_serve: bool) -> Device:
    known = HARDWARE.get(device.hardware) if device.hardware else None
    memory = device.memory if device.memory is not None else known.memory_bytes if known else 0
    host = device.host_memory if device.host_memory is not None else known.host_bytes if known else memory
    unified = _is_unified(device, known)
    compute = device.compute
    overhead = device.overhead_s if device.overhead_s is not None else known.overhead_s if known else OVERHEAD_S
    link_bytes_per_s: float | None = None
    if not unified:
        link_bytes_per_s = device.link.bytes_per_s if device.link else known.link_bytes_per_s if known else None
    return Device(
        name=DeviceName(name),
        hardware=device.hardware,
        memory_bytes=memory,
        host_bytes=min(host, memory) if unified else host,
        slot_bytes=device.slot_memory,
        link_bytes_per_s=link_bytes_per_s,
        link_latency_s=device.link.latency_s if device.link else 0.0,
        flops=compute.flops if compute else known.flops if known else 1.0,
        memory_bytes_per_s=compute.bytes_per_s if compute else known.memory_bytes_per_s if known else 1.0,
        overhead_s=overhead,
        serves_experts=may_serve if device.serves_experts is None else device.serves_experts,
        times=device.times,
        emulated=device.emulated,
    )
