"""Spans of time: what a process did when. For ``raymoe trace``; no torch, no Ray.

A process records by its own monotonic clock. A recording carries that clock's offset to wall time, so that those of
several processes line up, as far as the wall clocks of their hosts agree.
"""

import bisect
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from raymoe.types import StepId

MOST_SPANS = 50_000  # of one process: some hundred steps of a deep model, in some ten MB
OFFSET_READINGS = 9  # the quickest of these pairs of readings tells an offset to about a microsecond

Lane = Literal["compute", "link", "wait"]
LANES: tuple[Lane, ...] = ("compute", "link", "wait")
MAIN, SHADOW = "main", "shadow"

Clock = Callable[[], float]
Fact = str | int | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One thing that a process did, or waited for.

    Attributes:
        lane: what was busy: a processor, a link, or nobody.
        kind: in words; "trunk", "experts", "load" and so on.
        start_s, end_s: on the process's own clock; equal where it is a moment.
        layer: MoE layer; experts: of it; step: the forward that it was for. None or empty where there is none.
        facts: what else is known, by name.
    """

    lane: Lane
    kind: str
    start_s: float
    end_s: float
    layer: int | None = None
    experts: tuple[int, ...] = ()
    step: StepId | None = None
    facts: dict[str, Fact] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Layer, experts and kind, as a timeline shows them."""
        layer = () if self.layer is None else (f"L{self.layer}",)
        return " ".join((*layer, *(f"E{expert}" for expert in self.experts), self.kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one process recorded.

    Attributes:
        role: "main", "shadow" or "worker NAME".
        emulated_link: its loads imitate a slow bus: their speeds are no hardware's.
        spans: in the order in which they ended.
        offset_s: wall time minus the process's clock.
        dropped: older spans that found no room.
    """

    role: str
    emulated_link: bool
    spans: tuple[Span, ...]
    offset_s: float
    dropped: int
    pid: int

    @property
    def label(self) -> str:
        """The role, and whether its link is emulated."""
        return f"{self.role} (emulated link)" if self.emulated_link else self.role


class Tracer:
    """Records the spans of one process, or of one role in it; of too many, it keeps the last. From any thread.

    Args:
        clock: monotonic; spans' times are its.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        role: str,
        *,
        emulated_link: bool = False,
        capacity: int = MOST_SPANS,
        clock: Clock = time.perf_counter,
        wall: Clock = time.time,
    ) -> None:
        self.now = clock
        self._role = role
        self._emulated_link = emulated_link
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._added = 0
        self._lock = threading.Lock()
        self._offset_s = wall_offset_s(clock, wall)

    def add(self, span: Span) -> None:
        """Keep a span; the oldest goes where there are too many."""
        with self._lock:
            self._spans.append(span)
            self._added += 1

    def recording(self) -> Recording:
        """What was recorded so far."""
        with self._lock:
            spans, dropped = tuple(self._spans), self._added - len(self._spans)
        return Recording(
            role=self._role,
            emulated_link=self._emulated_link,
            spans=spans,
            offset_s=self._offset_s,
            dropped=dropped,
            pid=os.getpid(),
        )


def wall_offset_s(clock: Clock, wall: Clock) -> float:
    """Wall time minus the clock's, from the pair of readings that lay closest together."""
    best: tuple[float, float] | None = None
    for _ in range(OFFSET_READINGS):
        before = clock()
        seconds = wall()
        after = clock()
        if best is None or after - before < best[0]:
            best = after - before, seconds - (before + after) / 2
    assert best is not None
    return best[1]


def aligned(recordings: Sequence[Recording]) -> list[Recording]:
    """The recordings on one clock, which shows 0 when the first span of all began; ``offset_s`` is its wall time.

    Workers are not always told the step that they work for. Where the main process waited for the experts of the same
    layer meanwhile, that wait's step is theirs.
    """
    begin_s = min((span.start_s + r.offset_s for r in recordings for span in r.spans), default=0.0)
    moved = [
        replace(
            recording,
            offset_s=begin_s,
            spans=tuple(_moved(span, recording.offset_s - begin_s) for span in recording.spans),
        )
        for recording in recordings
    ]
    waits: dict[int, list[Span]] = {}
    for span in (span for recording in moved if recording.role == MAIN for span in recording.spans):
        if span.kind == "experts" and span.layer is not None:
            waits.setdefault(span.layer, []).append(span)
    for spans in waits.values():
        spans.sort(key=lambda span: span.start_s)
    return [replace(recording, spans=tuple(_with_step(span, waits) for span in recording.spans)) for recording in moved]


def _moved(span: Span, by_s: float) -> Span:
    return replace(span, start_s=span.start_s + by_s, end_s=span.end_s + by_s)


def _with_step(span: Span, waits: dict[int, list[Span]]) -> Span:
    if span.step is not None or span.layer is None:
        return span
    mine = waits.get(span.layer, [])
    before = bisect.bisect_right(mine, span.start_s, key=lambda wait: wait.start_s) - 1
    if before < 0 or span.start_s > mine[before].end_s:
        return span
    return replace(span, step=mine[before].step)


def busy_s(spans: Sequence[Span], start_s: float, end_s: float) -> float:
    """Seconds between two times that at least one of the spans covers."""
    total, until = 0.0, start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        first, last = max(span.start_s, until), min(span.end_s, end_s)
        if last > first:
            total += last - first
            until = last
    return total
