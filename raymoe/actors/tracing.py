"""Recording in all processes of an application: begin everywhere, end everywhere, and bring home what they recorded."""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from raymoe.actors.names import NAMESPACE, shadow_name, worker_name
from raymoe.config import ClusterConfig
from raymoe.engine.service import ModelService
from raymoe.experts.worker import ExpertWorker
from raymoe.observe.trace import MAIN, SHADOW, Recording
from raymoe.types import DeviceName

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 30.0  # some ten MB of spans from each process


class ClusterTrace:
    """A context manager that records while it is entered, while no request is under way at either end.

    Attributes:
        recordings: in the order main, shadow, workers as configured; complete once it was left.
        silent: roles of processes that did not answer, and so are missing.
    """

    def __init__(
        self, app: str, config: ClusterConfig, service: ModelService, local: Mapping[DeviceName, ExpertWorker]
    ) -> None:
        self.recordings: tuple[Recording, ...] = ()
        self.silent: tuple[str, ...] = ()
        self._service = service
        self._local = local
        self._devices = [DeviceName(device.name) for device in config.devices]
        self._actors = {
            f"worker {device.name}": worker_name(app, device.name)
            for device in config.devices
            if DeviceName(device.name) not in local
        }
        if config.predictor_kind == "shadow":
            self._actors[SHADOW] = shadow_name(app)

    def __enter__(self) -> "ClusterTrace":
        self._switch(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = self._switch(False)
        roles = [MAIN, SHADOW, *(f"worker {name}" for name in self._devices)]
        self.recordings = tuple(found[role] for role in roles if role in found)

    def _switch(self, on: bool) -> dict[str, Recording]:
        """Begin or end everywhere; returns by role what was recorded until now."""
        answers: dict[str, Any] = {}
        asked, silent = {}, []
        for role, name in self._actors.items():
            try:
                handle: Any = ray.get_actor(name, NAMESPACE)
                asked[role] = handle.trace.remote(on)
            except ValueError:
                silent.append(role)
        answers[MAIN] = self._service.trace(on)
        for name, worker in self._local.items():
            answers[f"worker {name}"] = worker.trace(on)
        for role, reference in asked.items():
            try:
                answers[role] = ray.get(reference, timeout=ANSWER_TIMEOUT_S)
            except RayError as error:
                log.warning("%s can't be traced: %s", role, error)
                silent.append(role)
        self.silent = tuple(silent)
        return {role: recording for role, recording in answers.items() if recording is not None}
