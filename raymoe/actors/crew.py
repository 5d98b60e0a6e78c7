"""The expert workers of an application: found or created, described, loaded, told, and ended. All of it Ray calls.

Part of the placement actor; light to import, as that is.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raymoe.actors.names import NAMESPACE, worker_name
from raymoe.actors.options import on_device
from raymoe.config import ClusterConfig, DeviceConfig, SchedulingConfig
from raymoe.errors import RaymoeError, StartError
from raymoe.placement.ownership import Capacity, Ownership
from raymoe.types import DeviceName, ExpertKey, LayerSize

if TYPE_CHECKING:
    from raymoe.actors.worker import WorkerInfo
    from raymoe.transport.frames import Limits
    from raymoe.transport.sockets import Endpoint

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # to schedule a worker and open the checkpoint there
LOAD_TIMEOUT_S = 3600.0  # to read a shard from disk
REPORT_TIMEOUT_S = 5.0
SERVE_TIMEOUT_S = 30.0  # a worker may be reading its shard while it is asked to open its sockets
HOST_SHARE = 0.8  # of the free memory of a node, for all shards on it


class Crew:
    """Ray's handles on the workers, and what each said of itself when it was last asked.

    Attributes:
        handles, infos, endpoints: of the workers that are known.
    """

    def __init__(self, app: str, config: ClusterConfig, sizes: tuple[LayerSize, ...], limits: "Limits") -> None:
        self.handles: dict[DeviceName, ActorHandle] = {}
        self.infos: dict[DeviceName, WorkerInfo] = {}
        self.endpoints: dict[DeviceName, Endpoint] = {}
        self._app = app
        self._config = config
        self._sizes = sizes
        self._limits = limits

    @property
    def remote(self) -> list[DeviceConfig]:
        """The devices that have a worker of their own."""
        return [device for device in self._config.devices if device.transport == "zmq"]

    def rebuild(self) -> None:
        """Find the workers that run already, as they do where the placement actor was restarted."""
        for device in self.remote:
            name = DeviceName(device.name)
            with contextlib.suppress(ValueError, RayError):
                handle = ray.get_actor(worker_name(self._app, device.name), NAMESPACE)
                info: Any = ray.get(handle.describe.remote(), timeout=REPORT_TIMEOUT_S)
                self.handles[name], self.infos[name] = handle, info
                if info.endpoint is not None:
                    self.endpoints[name] = info.endpoint

    def start(self, scheduling: SchedulingConfig) -> None:
        """Find or create all workers, and wait for them. Raises StartError where one does not come."""
        self.handles = {DeviceName(device.name): self._find_or_create(device, scheduling) for device in self.remote}
        self.infos = {name: self._describe(name, handle) for name, handle in self.handles.items()}

    def capacities(self, local: dict[DeviceName, int]) -> list[Capacity]:
        """Host memory per device: as configured, else an equal part of what is free on its node.

        Args:
            local: of the devices in the engine's process.
        """
        sharing: dict[str, int] = {}
        for info in self.infos.values():
            sharing[info.node] = sharing.get(info.node, 0) + 1
        capacities = []
        for device in self._config.devices:
            name = DeviceName(device.name)
            if name in local:
                capacities.append(Capacity(device=name, host_bytes=local[name]))
                continue
            info = self.infos[name]
            held = sum(self._sizes[key.layer].expert_bytes for key in info.owned)
            free = int(HOST_SHARE * info.free_host_bytes) // sharing[info.node] + held
            capacities.append(Capacity(device=name, host_bytes=device.host_memory or free))
        return capacities

    def load(self, ownership: Ownership) -> None:
        """Let each worker read what it lacks of its shard, and wait for all. Raises what a worker fails with."""
        everything = self._config.scheduling.policy == "all_resident"
        loads: list[Any] = []
        for name, handle in self.handles.items():
            here = set(self.infos[name].owned)
            missing: tuple[ExpertKey, ...] = tuple(key for key in ownership[name] if key not in here)
            loads.append(handle.own.remote(missing, everything))
        for reference in loads:
            unwrapped(reference, LOAD_TIMEOUT_S)

    def tell(self, scheduling: SchedulingConfig) -> tuple[DeviceName, ...]:
        """Put settings in force. Returns the workers that did not confirm in time."""
        settings = scheduling.model_dump(mode="json")
        asked: dict[Any, DeviceName] = {
            handle.reconfigure.remote(settings): name for name, handle in self.handles.items()
        }
        done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=REPORT_TIMEOUT_S) if asked else ([], [])
        failed = [reference for reference in done if not _succeeds(reference)]
        return tuple(asked[reference] for reference in (*silent, *failed))

    def admit(self, keys: Sequence[bytes]) -> None:
        """Let clients in at every worker, whose sockets are opened where they are not yet."""
        binding = self.binding()
        for name, handle in self.handles.items():
            answer: Any = handle.serve.remote(binding(self.infos[name].address), tuple(keys))
            self.endpoints[name] = unwrapped(answer, SERVE_TIMEOUT_S)

    def admit_soon(self, key: bytes) -> None:
        """Let one more client in, as far as workers answer in time."""
        binding = self.binding()
        asked: list[Any] = [
            handle.serve.remote(binding(self.infos[name].address), (key,)) for name, handle in self.handles.items()
        ]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=REPORT_TIMEOUT_S)

    def binding(self) -> Callable[[str], str]:
        """What to bind on a node, by its address: loopback while there is no other node. Ray is asked once."""
        addresses = {info.address for info in self.infos.values()} | {ray.util.get_node_ip_address()}
        nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        alone = len(addresses) == 1 == len(nodes)
        return lambda node_address: self._config.bind or ("127.0.0.1" if alone else node_address)

    def progress(self) -> int:
        """How many experts are in host memory, over all workers; 0 where they do not answer in time."""
        try:
            return sum(ray.get([h.progress.remote() for h in self.handles.values()], timeout=REPORT_TIMEOUT_S))
        except RayError:
            return 0

    def end(self) -> None:
        """End all workers, those of an earlier start too."""
        for device in self._config.devices:
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(worker_name(self._app, device.name), NAMESPACE), no_restart=True)
        self.handles, self.infos, self.endpoints = {}, {}, {}

    def _find_or_create(self, device: DeviceConfig, scheduling: SchedulingConfig) -> ActorHandle:
        from raymoe.actors.worker import WorkerShell

        name = worker_name(self._app, device.name)
        try:
            return ray.get_actor(name, NAMESPACE)
        except ValueError:
            pass
        options = on_device(name, device.kind, device.resources, device.node_labels)
        model = self._config.model.model_dump(mode="json")
        remote_class: Any = ray.remote(WorkerShell)
        settings = scheduling.model_dump(mode="json")
        return remote_class.options(**options).remote(
            self._app, model, device.model_dump(mode="json"), self._limits, settings
        )

    def _describe(self, name: DeviceName, handle: ActorHandle) -> "WorkerInfo":
        try:
            return unwrapped(handle.describe.remote(), START_TIMEOUT_S)
        except GetTimeoutError as error:
            device = next(device for device in self._config.devices if device.name == name)
            wanted = {**device.node_labels, **device.resources} or "any node"
            raise StartError(
                f'device "{name}" was not scheduled within {START_TIMEOUT_S:g} s; no alive node offers {wanted}? '
                "see `ray status`"
            ) from error


def unwrapped(reference: Any, timeout_s: float) -> Any:
    """``ray.get`` with our own errors unwrapped."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RaymoeError):
            raise error.cause from None
        raise


def _succeeds(reference: Any) -> bool:
    try:
        ray.get(reference)
        return True
    except RayError as error:
        log.warning("a worker did not take its settings: %s", error)
        return False
