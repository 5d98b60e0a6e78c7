"""A device's line in the stats, and the settings'."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raymoe.config import DeviceConfig, SchedulingConfig
from raymoe.observe.stats import DeviceStats, SettingsStats
from raymoe.placement.health import DeviceHealth

if TYPE_CHECKING:
    from raymoe.actors.worker import WorkerInfo
    from raymoe.experts.report import WorkerReport


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


def seen_stats(
    device: DeviceConfig,
    health: DeviceHealth,
    info: "WorkerInfo | None",
    answer: "tuple[WorkerReport, int] | None",
    now_s: float,
) -> DeviceStats:
    """A device as the placement actor sees it: its state, and its worker's report where there is one.

    Args:
        info: of the process that was there last; None where none ever was.
        answer: the report, and how many malformed messages were dropped; None where it did not answer.
        now_s: by the clock of ``health``.
    """
    node, pid = (info.node, info.pid) if info is not None else ("", 0)
    if answer is None:
        stats = _unknown(device, node=node, pid=pid)
    else:
        stats = device_stats(device, answer[0], node=node, pid=pid, dropped_messages=answer[1])
    return replace(
        stats,
        state=str(health.state),
        reason=health.reason,
        since_s=now_s - health.since_s,
        restarts=health.restarts,
        heartbeat_age_s=None if health.heard_s is None else max(0.0, now_s - health.heard_s),
    )


def shortages(replication: int, most: int, lost: int) -> tuple[str, ...]:
    """What the devices that are there can't do, in words.

    Args:
        replication: owners that every expert has.
        most: that it has had at best.
        lost: experts that nobody holds.
    """
    if lost:
        return (
            f"{lost:,} experts have no owner: the devices that are there have no room for them. Requests that need "
            "them wait, and then fail; bring a device back, or add one",
        )
    if replication < most:
        return (f"every expert has {replication} owner(s) instead of {most}, for want of devices or of their memory",)
    return ()


def _unknown(device: DeviceConfig, *, node: str, pid: int) -> DeviceStats:
    """The line of a device whose worker tells nothing: all that is known is where it was."""
    counts: dict[str, Any] = dict.fromkeys(("peak_slot_bytes", "host_bytes", "owned", "resident", "calls", "hits"), 0)
    totals: dict[str, Any] = dict.fromkeys(("misses", "hosted", "loads", "bytes_loaded", "evictions"), 0)
    ahead: dict[str, Any] = dict.fromkeys(("prefetches", "prefetches_refused", "prefetches_late"), 0)
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
        **counts,
        **totals,
        **ahead,
    )
