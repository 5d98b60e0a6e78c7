"""The shadow predictor as a Ray actor: a thin shell that says where it lives and hands the work to ``ShadowHost``."""

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from raymoe.config import ModelConfig, PredictorConfig
from raymoe.observe.trace import Recording
from raymoe.transport.frames import Limits
from raymoe.transport.sockets import Endpoint, KeyPair
from raymoe.types import DeviceName

if TYPE_CHECKING:
    from raymoe.engine.shadow_host import ShadowHost
    from raymoe.placement.assignment import Fleet
    from raymoe.transport.shadow import ShadowServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowInfo:
    """Where the shadow lives.

    Attributes:
        nbytes: of its weights.
        public_key: with which it asks at the workers'.
        endpoint: where it listens to the engine; None before it serves.
    """

    node: str
    address: str
    pid: int
    nbytes: int
    public_key: bytes
    endpoint: Endpoint | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowReport:
    """What the shadow says of itself: totals since its start, and why it stopped, if it did."""

    steps: int
    wasted: int
    guesses: int
    right: int
    dropped_messages: int
    failure: str | None


class ShadowShell:
    """One application's shadow. Raises CheckpointError where the checkpoint can't be opened on this node.

    Args:
        decides: whether it tells workers what to load, or leaves that to the engine.
    """

    def __init__(self, model: dict[str, Any], predictor: dict[str, Any], limits: Limits, decides: bool = True) -> None:
        # here and not above: the placement actor needs only the class
        from raymoe.engine.shadow_host import build_shadow_model

        self._config = PredictorConfig.model_validate(predictor)
        self._limits = limits
        self._decides = decides
        self._keys = KeyPair.create()
        self._model = build_shadow_model(ModelConfig.model_validate(model), self._config)
        self._server: ShadowServer | None = None
        self._host: ShadowHost | None = None

    def describe(self) -> ShadowInfo:
        """Node, address, memory and endpoint."""
        return ShadowInfo(
            node=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            nbytes=self._model.nbytes,
            public_key=self._keys.public,
            endpoint=self._server.endpoint if self._server else None,
        )

    def serve(self, address: str, clients: tuple[bytes, ...]) -> Endpoint:
        """Listen on ``address`` to these client keys, and go to work; a second call only admits more clients."""
        from raymoe.engine.shadow_host import ShadowHost, alignment_of
        from raymoe.transport.shadow import ShadowServer

        if self._server is None:
            self._server = ShadowServer(address, self._limits)
            alignment = alignment_of(self._config)
            self._host = ShadowHost(self._model, alignment, self._server, decides=self._decides)
            threading.Thread(target=self._host.run, name="shadow", daemon=True).start()
        self._server.clients.keys.update(clients)
        return self._server.endpoint

    def conduct(self, fleet: "Fleet", devices: tuple[DeviceName, ...], workers: dict[DeviceName, Endpoint]) -> None:
        """Send load orders to these workers from now on."""
        from raymoe.transport.client import WorkerClient

        assert self._host is not None, "it serves before it conducts"
        keys, limits = self._keys, self._limits
        self._host.connect(workers, lambda: WorkerClient(workers, keys, limits), fleet, devices)

    def trace(self, on: bool) -> Recording | None:
        """Begin to record; or end it, which returns what was recorded."""
        return None if self._host is None else self._host.trace(on)

    def report(self) -> ShadowReport:
        """Totals. Raises nothing: a shadow that has failed says so."""
        assert self._host is not None and self._server is not None, "it serves before it is asked"
        counts, failure = self._host.shadow.counts, self._host.failure
        return ShadowReport(
            steps=counts.steps,
            wasted=counts.wasted,
            guesses=counts.guesses,
            right=counts.right,
            dropped_messages=self._server.dropped,
            failure=None if failure is None else f"{type(failure).__name__}: {failure}",
        )
