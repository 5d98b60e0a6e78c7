"""A device's line in the stats, and the settings'."""

from typing import Any

from raymoe.config import DeviceConfig, SchedulingConfig
from raymoe.observe.stats import DeviceStats, SettingsStats


def settings_stats(scheduling: SchedulingConfig) -> SettingsStats:
    """The settings in force."""
    return SettingsStats(
        policy=scheduling.policy,
        substitutes=scheduling.substitutes,
        alpha=scheduling.alpha,
        alpha_max=scheduling.alpha_max,
        tpot_budget_s=scheduling.tpot_budget_s,
    )


def device_stats(
    device: DeviceConfig,
    report: Any,
    *,
    node: str,
    pid: int,
    dropped_messages: int = 0,
    heartbeat_age_s: float | None = None,
) -> DeviceStats:
    """A device's line in the stats, from its worker's report."""
    renamed = ("resident", "resident_count", "name")
    values = {name: getattr(report, name) for name in report.__slots__ if name not in renamed}
    return DeviceStats(
        name=device.name,
        kind=device.kind,
        transport=device.transport,
        state="healthy",
        node=node,
        pid=pid,
        resident=report.resident_count,
        resident_experts=report.resident,
        dropped_messages=dropped_messages,
        heartbeat_age_s=heartbeat_age_s,
        **values,
    )


def down_stats(device: DeviceConfig, *, node: str, pid: int, heartbeat_age_s: float | None = None) -> DeviceStats:
    """The line of a device whose worker does not answer: nothing is known but where it was."""
    unknown = dict.fromkeys(("peak_slot_bytes", "host_bytes", "owned", "resident", "calls", "hits", "misses"), 0)
    totals = dict.fromkeys(
        ("hosted", "loads", "bytes_loaded", "evictions", "prefetches", "prefetches_refused", "prefetches_late"), 0
    )
    return DeviceStats(
        name=device.name,
        kind=device.kind,
        transport=device.transport,
        state="down",
        node=node,
        pid=pid,
        emulated_link=device.link is not None,
        slot_budget_bytes=device.slot_memory,
        resident_experts=(),
        heartbeat_age_s=heartbeat_age_s,
        **unknown,
        **totals,
    )
