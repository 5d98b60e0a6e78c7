"""Hands metrics to Ray, which exports them at every node as ``ray_raymoe_…``. The only module here that knows Ray.

Counters and gauges come as they stand, once a second from a thread of its own: nothing is told per expert call. Ray's
own agent sends them on every ten seconds, so what is scraped is about so old.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ray.util import metrics

from raymoe.observe.metrics import APP, Metric, Values

log = logging.getLogger(__name__)

EVERY_S = 1.0
Observed = Sequence[tuple[Metric, Sequence[float]]]


class Exporter(Protocol):
    """What takes metrics; ``RayExporter``, or a list in tests."""

    def put(self, values: Values) -> None:
        """Totals of counters and states of gauges."""
        ...

    def observe(self, observed: Observed) -> None:
        """Values of histograms."""
        ...


class RayExporter:
    """One application's metrics of this process. Used by one thread.

    Args:
        make: makes Ray's metric of one of ours; tests put their own in its place.
    """

    def __init__(self, app: str, make: Callable[[Metric], Any] | None = None) -> None:
        self._app = app
        self._make = make or ray_metric
        self._made: dict[str, Any] = {}
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def put(self, values: Values) -> None:
        """Gauges are set; counters go up by what was added since the last time. One that fell began anew."""
        for metric, labels, value in values:
            tags = {APP: self._app, **labels}
            if metric.kind == "gauge":
                self._metric(metric).set(value, tags=tags)
                continue
            place = metric.name, tuple(sorted(tags.items()))
            before = self._totals.get(place)
            self._totals[place] = value
            if before is None:
                self._metric(metric).begin(tags)
            added = value if before is None or value < before else value - before
            if added > 0:
                self._metric(metric).inc(added, tags=tags)

    def observe(self, observed: Observed) -> None:
        """Values of histograms."""
        for metric, values in observed:
            made = self._metric(metric)
            for value in values:
                made.observe(value, tags={APP: self._app})

    def _metric(self, metric: Metric) -> Any:
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        return self._made[metric.name]


class Total(metrics.Counter):
    """A counter that is there before it counts anything, as rates of it want."""

    def begin(self, tags: dict[str, str]) -> None:
        """Show 0. ``inc`` takes no 0."""
        self._record(0.0, tags)


def ray_metric(metric: Metric) -> Any:
    """Ray's own metric object."""
    if metric.kind == "histogram":
        return metrics.Histogram(
            metric.name, description=metric.help, boundaries=list(metric.boundaries), tag_keys=metric.labels
        )
    kind = Total if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, description=metric.help, tag_keys=metric.labels)


class Publisher:
    """Hands on what ``read`` says, every second, from a thread of its own. Never raises: metrics are worth no request.

    Args:
        read: counters and gauges as they stand; observe: what histograms observed since it was last called.
    """

    def __init__(
        self,
        exporter: Exporter,
        read: Callable[[], Values],
        observe: Callable[[], Observed] = lambda: (),
        every_s: float = EVERY_S,
    ) -> None:
        self._exporter = exporter
        self._read = read
        self._observe = observe
        self._every_s = every_s
        self._has_failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> "Publisher":
        """Begin; returns itself."""
        self._thread.start()
        return self

    def publish(self) -> None:
        """Hand on what there is now."""
        self._exporter.put(self._read())
        self._exporter.observe(self._observe())

    def close(self) -> None:
        """Stop. A second call does nothing."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._every_s + 1.0)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.publish()
            except Exception:
                if not self._has_failed:
                    log.warning("metrics could not be published; that is said once", exc_info=True)
                self._has_failed = True
