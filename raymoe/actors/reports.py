"""A device's line in the stats."""

from typing import Any

from raymoe.config import DeviceConfig
from raymoe.observe.stats import DeviceStats


def device_stats(device: DeviceConfig, report: Any, *, node: str, pid: int, dropped_messages: int = 0) -> DeviceStats:
    """A device's line in the stats, from its worker's report."""
    values = {name: getattr(report, name) for name in report.__slots__ if name not in ("resident", "name")}
    return DeviceStats(
        name=device.name,
        kind=device.kind,
        transport=device.transport,
        state="healthy",
        node=node,
        pid=pid,
        resident=len(report.resident),
        resident_experts=report.resident,
        dropped_messages=dropped_messages,
        **values,
    )


def down_stats(device: DeviceConfig, *, node: str, pid: int) -> DeviceStats:
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
        **unknown,
        **totals,
    )
