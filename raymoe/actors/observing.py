"""What a session tells to those who look on: metrics, where experts are, and the last steps as a timeline."""

import base64
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from raymoe.actors.names import NAMESPACE, shadow_name, worker_name
from raymoe.actors.reports import device_stats
from raymoe.config import ClusterConfig
from raymoe.engine.service import ModelService
from raymoe.experts.report import ResidencyMap
from raymoe.experts.worker import ExpertWorker
from raymoe.observe import metrics
from raymoe.observe.ray_metrics import Publisher, RayExporter
from raymoe.observe.stats import EngineStats
from raymoe.observe.timeline import EMPTY, steps_to_record, timeline
from raymoe.observe.trace import SHADOW, Recording
from raymoe.types import DeviceName

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 2.0  # for a few decode steps; slower ones are cut short
TIMELINE_EVERY_S = 1.8  # however many ask: recording costs the recorded steps a few percent


class Observer:
    """Looks at one session for whoever asks. Any thread may ask.

    Args:
        engine_stats: the engine's counts and totals.
        placement: None where all devices live in this process.
    """

    def __init__(
        self,
        app: str,
        config: ClusterConfig,
        service: ModelService,
        local: Mapping[DeviceName, ExpertWorker],
        placement: ActorHandle | None,
        engine_stats: Callable[[], EngineStats],
    ) -> None:
        self._app = app
        self._config = config
        self._service = service
        self._local = local
        self._placement = placement
        self._engine_stats = engine_stats
        self._looking = threading.Lock()
        self._last: dict[str, Any] = EMPTY
        self._last_s = 0.0
        self._publisher: Publisher | None = None
        if ray.is_initialized():
            observe = lambda: metrics.of_observations(service.meter.take())  # noqa: E731 - a closure over one argument
            self._publisher = Publisher(RayExporter(app), self._values, observe).start()

    def close(self) -> None:
        """Publish no more."""
        if self._publisher is not None:
            self._publisher.close()

    # --- metrics ----------------------------------------------------------------------------------------

    def _values(self) -> metrics.Values:
        """Of the engine and of the devices in its process."""
        values = metrics.of_engine(self._engine_stats())
        values += metrics.of_faults(self._service.report().faults, (device.name for device in self._config.devices))
        values += metrics.of_substituted({str(name): count for name, count in self._service.substituted.items()})
        for device in self._config.devices:
            worker = self._local.get(DeviceName(device.name))
            if worker is not None:
                stats = device_stats(device, worker.report(names=False), node="local", pid=0)
                values += metrics.of_device(stats)
                values += metrics.of_health(device.name, "healthy", heartbeat_age_s=0.0, restarts=0)
        return values

    # --- where experts are ------------------------------------------------------------------------------

    def residency(self) -> dict[str, Any]:
        """Layers, experts, and by device a byte per expert each for where it is, its use, and its score; in base64."""
        maps: dict[str, ResidencyMap] = {str(name): worker.residency() for name, worker in self._local.items()}
        if self._placement is not None:
            answer: Any = self._placement.residency.remote()
            try:
                maps |= ray.get(answer, timeout=ANSWER_TIMEOUT_S)
            except RayError as error:
                log.warning("the placement actor does not tell where experts are: %s", error)
        card = self._service.card
        names = [device.name for device in self._config.devices if device.name in maps]
        return {
            "layers": card.layers,
            "experts": card.experts_per_layer,
            "devices": {name: as_json(maps[name]) for name in names},
        }

    # --- the last steps ---------------------------------------------------------------------------------

    def timeline(self) -> dict[str, Any]:
        """The last few decode steps of all processes; recorded now if the engine is at work, else before."""
        if self._service.is_idle or time.monotonic() - self._last_s < TIMELINE_EVERY_S:
            return self._last
        if not self._looking.acquire(blocking=False):
            return self._last
        try:
            recorded = timeline(self._record(), time.time())
            self._last = recorded or self._last
            self._last_s = time.monotonic()
        finally:
            self._looking.release()
        return self._last

    def _record(self) -> list[Recording]:
        """What main process, shadow and workers do while a few steps pass."""
        roles = [f"worker {device.name}" for device in self._config.devices]
        self._switch(True)
        main = None
        try:
            main = self._service.live.record(steps_to_record(self._service.card.layers), LOOK_TIMEOUT_S)
        finally:
            found = self._switch(False)
        if main is None:
            return []
        return [main, *(found[role] for role in (SHADOW, *roles) if role in found)]

    def _switch(self, on: bool) -> dict[str, Recording]:
        """Begin or end at the others; by role what they recorded. Those that do not answer are left out."""
        actors = {
            f"worker {device.name}": worker_name(self._app, device.name)
            for device in self._config.devices
            if DeviceName(device.name) not in self._local
        }
        if self._config.predictor_kind == "shadow":
            actors[SHADOW] = shadow_name(self._app)
        answers: dict[str, Any] = {f"worker {name}": worker.trace(on) for name, worker in self._local.items()}
        asked = {}
        for role, name in actors.items():
            try:
                handle: Any = ray.get_actor(name, NAMESPACE)
                asked[role] = handle.trace.remote(on)
            except (ValueError, RayError):
                log.debug("%s is not there to be looked at", role)
        for role, reference in asked.items():
            try:
                answers[role] = ray.get(reference, timeout=ANSWER_TIMEOUT_S)
            except RayError:
                log.debug("%s does not answer to those who look on", role)
        return {role: recording for role, recording in answers.items() if recording is not None}


def as_json(seen: ResidencyMap) -> dict[str, Any]:
    """One device's map."""
    return {
        "state": base64.b64encode(seen.place).decode(),
        "use": base64.b64encode(seen.use).decode(),
        "use_max": seen.use_max,
        "score": base64.b64encode(seen.score).decode(),
        "score_max": seen.score_max,
    }
