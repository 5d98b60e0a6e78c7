"""A live table of a running cluster, made of two looks at its stats: rates are differences. Pure but for rich's tables.

Stats are the JSON of GET /v1/stats, which is what ``ClusterStats.as_dict`` gives as well.
"""

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from raymoe.observe.terminal import STATE_STYLES, format_bytes

Stats = dict[str, Any]
COLUMNS = ("Hits", "Slots", "Link busy", "Link", "Loads", "Used", "Late", "Wasted", "Subst.", "Heard")
SILENT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Stats, and when they were taken, by a monotonic clock."""

    stats: Stats
    at_s: float


def table_of(now: Look, before: Look | None = None) -> Group:
    """Engine and devices. Without an earlier look there are no rates, and hit rates are since the start."""
    devices = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    for column in ("Device", "Kind", "State"):
        devices.add_column(column, no_wrap=True)
    for column in COLUMNS:
        devices.add_column(column, justify="right", no_wrap=True)
    for name, device in now.stats["devices"].items():
        earlier = None if before is None else before.stats["devices"].get(name)
        passed_s = 0.0 if before is None else now.at_s - before.at_s
        devices.add_row(*_device_row(name, device, earlier, passed_s))
    return Group(*_engine_lines(now, before), devices)


def _device_row(name: str, now: Stats, before: Stats | None, passed_s: float) -> list[Text | str]:
    kind = f"{now['kind']} emulated" if now["emulated_link"] else now["kind"]
    busy = rate(now, before, "link_busy_s", passed_s)
    flow = rate(now, before, "bytes_loaded", passed_s)
    slots = "host" if now["slot_count"] is None else f"{now['resident']:,}/{now['slot_count']:,}"
    age_s = now["heartbeat_age_s"]
    return [
        Text(name, style="bold"),
        kind,
        Text(now["state"], style=STATE_STYLES[now["state"]]),
        share(now, before, "hits", ("hits", "misses")),
        slots,
        "-" if busy is None else f"{min(1.0, busy):.0%}",
        "-" if flow is None else f"{format_bytes(flow)}/s",
        f"{now['loads']:,}",
        f"{now['prefetches_used']:,}",
        f"{now['prefetches_late']:,}",
        f"{now['prefetches_wasted']:,}",
        f"{now['substituted']:,}",
        "here" if age_s is None else Text(f"{age_s:.1f} s", style="red" if age_s > SILENT_S else ""),
    ]


def _engine_lines(now: Look, before: Look | None) -> list[Text]:
    engine = now.stats["engine"]
    title = Text(f"{now.stats['app']}: policy {now.stats['policy']}", style="bold")
    if engine is None:
        return [title, Text("The engine has told nothing yet.", style="dim")]
    title.append(f", {engine['model']} ({engine['dtype']}), alpha {engine['alpha']:.3g}", style="not bold")
    earlier = None if before is None else before.stats["engine"]
    passed_s = 0.0 if before is None else now.at_s - before.at_s
    tokens_s = rate(engine, earlier, "completion_tokens", passed_s)
    steps = engine["steps"] - (earlier or {"steps": 0})["steps"]
    decode_s = engine["decode_s"] - (earlier or {"decode_s": 0.0})["decode_s"]
    parts = [
        f"{engine['running']} running, {engine['waiting']} waiting",
        "- tokens/s" if tokens_s is None else f"{tokens_s:.1f} tokens/s",
        f"TPOT {1e3 * decode_s / steps:.2f} ms" if steps > 0 else "TPOT -",
        f"hits {share(engine, earlier, 'hits', ('hits', 'misses'))}",
        f"substituted {share(engine, earlier, 'substituted', ('hits', 'misses'))}",
        f"KV {format_bytes(engine['kv_bytes'])}"
        + ("" if engine["kv_budget_bytes"] is None else f" of {format_bytes(engine['kv_budget_bytes'])}"),
    ]
    if engine["recall"] is not None:
        parts.append(f"recall {engine['recall']:.1%}")
    predictor = now.stats["predictor"]
    if predictor is not None and predictor["state"] != "healthy":
        parts.append(f"predictor {predictor['state']}")
    return [title, Text(", ".join(parts))]


def rate(now: Stats, before: Stats | None, field: str, passed_s: float) -> float | None:
    """A total's growth per second; None where it is not known, or the counting began anew."""
    if before is None or passed_s <= 0 or now[field] < before[field]:
        return None
    return float((now[field] - before[field]) / passed_s)


def share(now: Stats, before: Stats | None, part: str, whole: tuple[str, ...]) -> str:
    """A part of a whole since the look before, or since the start; a dash where nothing happened."""
    earlier = before if before is not None and now[part] >= before[part] else None
    of = sum(now[field] - (earlier[field] if earlier else 0) for field in whole)
    return f"{(now[part] - (earlier[part] if earlier else 0)) / of:.1%}" if of > 0 else "-"
