"""Records a few decode steps of an engine that works, so that people can look on. Between two looks it costs nothing.

The engine's own thread puts the watching scheduler in place and takes it away again, always between two steps.
"""

import threading
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from raymoe.engine.scheduler_protocol import RowScheduler, Scheduler
from raymoe.engine.watch import WatchedRows, WatchedScheduler
from raymoe.model.trunk import ExpertBackend
from raymoe.observe.sink import Meter
from raymoe.observe.trace import MAIN, Recording, Tracer


class Steps(Protocol):
    """The step loop, as far as it is looked at."""

    experts: Scheduler


@dataclass(slots=True, eq=False)
class _Look:
    """One recording.

    Attributes:
        left: steps still to be recorded; tracer: records them, once the first begins.
    """

    left: int
    tracer: Tracer | None = None
    is_abandoned: bool = False
    recording: Recording | None = None
    done: threading.Event = field(default_factory=threading.Event)


class LiveTrace:
    """Records steps on demand.

    Args:
        engine: whose scheduler is watched.
        scheduler: the one that is in place while nobody looks; it is the trunk's backend as well.
        modules: the trunk's experts modules, which hold their backend as ``raymoe_backend``.
    """

    def __init__(self, engine: Steps, scheduler: Scheduler, modules: list[nn.Module]) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._modules = modules
        self._asking = threading.Lock()
        self._look: _Look | None = None

    def record(self, steps: int, timeout_s: float) -> Recording | None:
        """Record the next steps; None where too few come in time, or somebody else looks. From any thread."""
        if not self._asking.acquire(blocking=False):
            return None
        try:
            look = self._look = _Look(left=steps)
            if not look.done.wait(timeout_s):
                look.is_abandoned = True
                look.done.wait(timeout_s)  # one step more: what there is by then is worth showing
            return look.recording
        finally:
            self._asking.release()

    def between_steps(self, rows: int) -> None:
        """A step of so many requests is about to begin. On the engine's thread."""
        look = self._look
        if look is None:
            return
        if look.tracer is None:
            if rows and not look.is_abandoned and self._engine.experts is self._scheduler:
                look.tracer = Tracer(MAIN)
                self._put(self._watched(look.tracer))
            elif look.is_abandoned or self._engine.experts is not self._scheduler:
                self._end(look)
            return
        look.left -= 1
        if look.left <= 0 or look.is_abandoned or not rows:
            self._put(self._scheduler)
            look.recording = look.tracer.recording()
            self._end(look)

    def _end(self, look: _Look) -> None:
        self._look = None
        look.done.set()

    def _watched(self, tracer: Tracer) -> WatchedScheduler:
        backend: ExpertBackend = self._scheduler  # type: ignore[assignment]
        kind = WatchedRows if isinstance(self._scheduler, RowScheduler) else WatchedScheduler
        return kind(self._scheduler, backend, tracer)

    def _put(self, scheduler: Scheduler) -> None:
        self._engine.experts = scheduler
        for module in self._modules:
            module.raymoe_backend = scheduler  # type: ignore[assignment]


class LiveMeter(Meter):
    """The sink of an engine that may be looked at."""

    def __init__(self, live: LiveTrace) -> None:
        super().__init__()
        self._live = live

    def step(self, rows: int) -> None:
        """A decode step of so many requests is about to begin."""
        self._live.between_steps(rows)
        if rows:
            super().step(rows)
