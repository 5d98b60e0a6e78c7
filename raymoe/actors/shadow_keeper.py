"""Starts an application's shadow, and knows how it is. Part of the placement actor; light to import, as that is.

Without its shadow a model answers as well, only slower: nothing here raises, what is wrong is told by the stats.
"""

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from raymoe.actors.names import NAMESPACE, shadow_name
from raymoe.actors.options import on_device
from raymoe.config import ClusterConfig
from raymoe.observe.stats import PredictorStats
from raymoe.types import DeviceName

if TYPE_CHECKING:
    from raymoe.actors.shadow import ShadowInfo, ShadowReport
    from raymoe.placement.assignment import Fleet
    from raymoe.transport.frames import Limits
    from raymoe.transport.sockets import Endpoint

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0


class ShadowKeeper:
    """The shadow of one application.

    Attributes:
        endpoint: where it listens now; None while it is not there.
        reason: why it is not.
    """

    def __init__(self, app: str, config: ClusterConfig, limits: "Limits") -> None:
        assert config.predictor is not None
        self.endpoint: Endpoint | None = None
        self.reason: str | None = "not started yet"
        self._name = shadow_name(app)
        self._model = config.model.model_dump(mode="json")
        self._config = config.predictor
        self._devices = tuple(DeviceName(device.name) for device in config.devices)
        self._limits = limits
        self._decides = config.scheduling.policy != "joint"  # there the engine does
        self._handle: ActorHandle | None = None
        self._info: ShadowInfo | None = None
        self._report: ShadowReport | None = None

    @property
    def public_key(self) -> bytes | None:
        """With which it asks at the workers'; None while it is not known."""
        return None if self._info is None else self._info.public_key

    def create(self) -> None:
        """Find the actor, or start it. Does not wait for it."""
        from raymoe.actors.shadow import ShadowShell

        config = self._config
        options = on_device(self._name, config.device, config.resources, config.node_labels)
        remote_class: Any = ray.remote(ShadowShell)
        predictor = config.model_dump(mode="json")
        self._handle = remote_class.options(**options, get_if_exists=True).remote(
            self._model, predictor, self._limits, self._decides
        )

    def find(self, wait_s: float) -> "ShadowInfo | None":
        """Wait for it to be ready; None where it is not in time."""
        if self._handle is None:
            self.create()
        assert self._handle is not None
        self._info = self._ask(self._handle.describe.remote(), wait_s)
        return self._info

    def connect(
        self, address: str, clients: tuple[bytes, ...], fleet: "Fleet", workers: "dict[DeviceName, Endpoint]"
    ) -> None:
        """Let it listen to these clients, and order from these workers."""
        assert self._handle is not None
        endpoint = self._ask(self._handle.serve.remote(address, clients), ANSWER_TIMEOUT_S)
        if endpoint is not None:
            self._ask(self._handle.conduct.remote(fleet, self._devices, workers), ANSWER_TIMEOUT_S)
            self.endpoint, self.reason, self._report = endpoint, None, None

    def is_well(self) -> bool:
        """Whether the shadow that was connected still runs. One that has failed is ended: Ray starts another."""
        if self._handle is None or self.endpoint is None:
            return False
        info = self._ask(self._handle.describe.remote(), ANSWER_TIMEOUT_S)
        if info is None or info.endpoint != self.endpoint:  # gone, or another life of it
            return False
        self._report = self._ask(self._handle.report.remote(), ANSWER_TIMEOUT_S)
        if self._report is not None and self._report.failure is not None:
            self.endpoint, self.reason = None, self._report.failure
            ray.kill(self._handle, no_restart=False)
        return self.endpoint is not None

    def stats(self) -> PredictorStats:
        """How it is, as of a moment ago."""
        info, report = self._info, self._report
        if info is None or self.endpoint is None:
            return PredictorStats(kind=self._config.kind, state="down", reason=self.reason)
        counted = ("steps", "wasted", "guesses", "right", "dropped_messages") if report is not None else ()
        return PredictorStats(
            kind=self._config.kind,
            state="healthy",
            node=info.node,
            pid=info.pid,
            nbytes=info.nbytes,
            **{name: getattr(report, name) for name in counted},
        )

    def end(self) -> None:
        """End the actor."""
        self.endpoint = self._info = self._handle = None
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(self._name, NAMESPACE), no_restart=True)

    def _ask(self, reference: Any, wait_s: float) -> Any:
        """An answer, or None where there is none in time or it failed."""
        try:
            answer = ray.get(reference, timeout=wait_s)
        except RayError as error:
            reason = why(error)
            if self.endpoint is not None or self.reason != reason:
                log.warning("the shadow does not answer; experts are loaded when they are asked for: %s", error)
            self.endpoint, self.reason = None, reason
            return None
        return answer


def why(error: RayError) -> str:
    """An error in one line. What an actor fails with when it is made comes as a traceback, whose end says it."""
    if isinstance(error, GetTimeoutError):
        return "it has not started yet, or is busy: no answer in time"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "Traceback" in str(error) or "creation task" in str(error) else " ".join(lines)
