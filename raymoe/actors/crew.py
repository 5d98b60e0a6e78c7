"""The expert workers of an application: found or created, described, loaded, told, and ended. All of it Ray calls.

Part of the placement actor; light to import, as that is.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raymoe.actors.names import NAMESPACE, worker_name
from raymoe.actors.nodes import is_offered, wishes
from raymoe.actors.options import on_device
from raymoe.config import ClusterConfig, DeviceConfig
from raymoe.errors import RaymoeError, StartError
from raymoe.placement.digest_book import DigestBook, check_same_weights
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
        limits: most bytes of host memory that each one's shard may take.
        scheduling: the settings in force.
        weights: fingerprint of the checkpoint that an engine serves; None before one has said it.
    """

    def __init__(self, app: str, config: ClusterConfig, sizes: tuple[LayerSize, ...], limits: "Limits") -> None:
        self.handles: dict[DeviceName, ActorHandle] = {}
        self.infos: dict[DeviceName, WorkerInfo] = {}
        self.endpoints: dict[DeviceName, Endpoint] = {}
        self.limits: dict[DeviceName, int] = {}
        self.scheduling = config.scheduling
        self.weights: str | None = None
        self._digests = DigestBook()
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
            with contextlib.suppress(ValueError, RayError):
                name = DeviceName(device.name)
                self.handles[name] = ray.get_actor(worker_name(self._app, device.name), NAMESPACE)
        found = self.ask("describe", names=self.handles)
        self.infos.update(found)  # all of them first: how many share a node says what each may take
        for name, info in found.items():
            self.arrived(name, info)
            if info.endpoint is not None:
                self.endpoints[name] = info.endpoint
        for name, digests in self.ask("digests", names=found).items():
            self._digests.add(name, digests)

    def start(self) -> None:
        """Find or create the workers, and wait for them. Those of optional devices only where a node offers one.

        Raises StartError where a worker does not come.
        """
        nodes = ray.nodes()
        here = [device for device in self.remote if not device.optional or is_offered(device, nodes)]
        handles = {DeviceName(device.name): self.find_or_create(device) for device in here}
        for device in here:
            name = DeviceName(device.name)
            try:
                self.arrived(name, self._describe(name, handles[name]))
            except StartError:
                if not device.optional:
                    raise
                log.warning("optional device %s does not start; it may come later", name)

    def find_or_create(self, device: DeviceConfig) -> ActorHandle:
        """The worker of a device, whether it has started yet or not."""
        name = DeviceName(device.name)
        if name not in self.handles:
            self.handles[name] = self._find_or_create(device)
        return self.handles[name]

    def arrived(self, name: DeviceName, info: "WorkerInfo") -> None:
        """A worker's process answers, and says where it lives and what it holds."""
        self.infos[name] = info
        self.endpoints.pop(name, None)
        device = next(device for device in self.remote if device.name == name)
        sharing = sum(other.node == info.node for other in self.infos.values())
        held = sum(self._sizes[key.layer].expert_bytes for key in info.owned)
        self.limits[name] = device.host_memory or int(HOST_SHARE * info.free_host_bytes) // sharing + held

    def capacities(self, local: dict[DeviceName, int]) -> list[Capacity]:
        """Host memory per device that is there: as configured, else an equal part of what is free on its node.

        Args:
            local: of the devices in the engine's process.
        """
        for name, info in self.infos.items():  # now it is known how many share each node
            self.arrived(name, info)
        memory = {**self.limits, **local}
        names = [DeviceName(device.name) for device in self._config.devices]
        return [Capacity(device=name, host_bytes=memory[name]) for name in names if name in memory]

    def load(self, ownership: Ownership) -> None:
        """Let each worker read what it lacks of its shard, and wait for all. Raises what a worker fails with."""
        loads = {}
        for name, info in self.infos.items():
            here = set(info.owned)
            missing = tuple(key for key in ownership[name] if key not in here)
            loads[name] = self._own(name, missing, self._loads_all)
        for name, reference in loads.items():
            self._digests.add(name, unwrapped(reference, LOAD_TIMEOUT_S))

    def read(self, name: DeviceName, keys: tuple[ExpertKey, ...], *, fresh: bool) -> None:
        """Let one worker read experts, and wait for it. Raises what it fails with.

        Args:
            fresh: whether it holds nothing yet; its slots are then cut for these, and filled where the policy says so.
        """
        self._digests.add(name, unwrapped(self._own(name, keys, fresh and self._loads_all), LOAD_TIMEOUT_S))

    def _own(self, name: DeviceName, keys: tuple[ExpertKey, ...], load_all: bool) -> Any:
        self.check_weights(name)
        return self.handles[name].own.remote(keys, load_all, self._digests.of(keys))

    def look(self, names: Iterable[DeviceName]) -> None:
        """Ask these workers what they hold now, slots too; another process of one is the repairs' business."""
        for name, info in self.ask("describe", names=names).items():
            if info.incarnation == self.infos[name].incarnation:
                self.infos[name] = info

    def check_weights(self, *names: DeviceName) -> None:
        """Raise CheckpointError where one of these workers, or of all, has other weights open than the engine."""
        if self.weights is None:
            return
        infos = {name: self.infos[name] for name in names or self.infos}
        check_same_weights(self.weights, [(name, info.address, info.fingerprint) for name, info in infos.items()])

    def give_up(self, name: DeviceName, keys: tuple[ExpertKey, ...]) -> None:
        """Let one worker give experts up."""
        unwrapped(self.handles[name].disown.remote(keys), REPORT_TIMEOUT_S)

    def tell(self, names: Iterable[DeviceName] | None = None) -> tuple[DeviceName, ...]:
        """Put the settings in force at these workers, or at all. Returns those that did not confirm in time."""
        settings = self.scheduling.model_dump(mode="json")
        told = list(self.infos if names is None else names)
        confirmed = self.ask("reconfigure", settings, names=told)
        return tuple(name for name in told if name not in confirmed)

    def admit(self, keys: Sequence[bytes], names: Iterable[DeviceName] | None = None) -> None:
        """Let clients in at these workers, or at all; sockets are opened where they are not yet.

        Raises what a worker fails with.
        """
        for reference, name in self._serving(keys, self.infos if names is None else names).items():
            self.endpoints[name] = unwrapped(reference, SERVE_TIMEOUT_S)

    def admit_soon(self, keys: Sequence[bytes], names: Iterable[DeviceName]) -> None:
        """Let more clients in, as far as these workers answer in time."""
        asked = self._serving(keys, names)
        for reference, endpoint in answers(asked, REPORT_TIMEOUT_S).items():
            self.endpoints[asked[reference]] = endpoint

    def _serving(self, keys: Sequence[bytes], names: Iterable[DeviceName]) -> dict[Any, DeviceName]:
        """Ask these workers to let clients in; by reference, whose the endpoint to come is."""
        binding = self.binding()
        return {self.handles[name].serve.remote(binding(self.infos[name].address), tuple(keys)): name for name in names}

    def binding(self) -> Callable[[str], str]:
        """What to bind on a node, by its address: loopback where there is no other node, nor will be."""
        addresses = {info.address for info in self.infos.values()} | {ray.util.get_node_ip_address()}
        nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        alone = len(addresses) == 1 == len(nodes) and not any(device.optional for device in self._config.devices)
        return lambda node_address: self._config.bind or ("127.0.0.1" if alone else node_address)

    def ask(
        self, method: str, *arguments: Any, names: Iterable[DeviceName], wait_s: float = REPORT_TIMEOUT_S
    ) -> dict[DeviceName, Any]:
        """What a method of these workers answers; those that do not answer in time are left out."""
        asked: dict[Any, DeviceName] = {
            getattr(self.handles[name], method).remote(*arguments): name for name in names if name in self.handles
        }
        return {asked[reference]: answer for reference, answer in answers(asked, wait_s).items()}

    def end(self) -> None:
        """End all workers, those of an earlier start too."""
        for device in self._config.devices:
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(worker_name(self._app, device.name), NAMESPACE), no_restart=True)
        self.handles, self.infos, self.endpoints, self.limits = {}, {}, {}, {}
        self._digests = DigestBook()

    @property
    def _loads_all(self) -> bool:
        return self._config.scheduling.policy == "all_resident"

    def _find_or_create(self, device: DeviceConfig) -> ActorHandle:
        from raymoe.actors.worker import WorkerShell

        name = worker_name(self._app, device.name)
        try:
            return ray.get_actor(name, NAMESPACE)
        except ValueError:
            pass
        options = on_device(name, device.kind, device.resources, device.node_labels)
        model = self._config.model.model_dump(mode="json")
        remote_class: Any = ray.remote(WorkerShell)
        settings = self.scheduling.model_dump(mode="json")
        return remote_class.options(**options).remote(
            self._app, model, device.model_dump(mode="json"), self._limits, settings
        )

    def _describe(self, name: DeviceName, handle: ActorHandle) -> "WorkerInfo":
        try:
            return unwrapped(handle.describe.remote(), START_TIMEOUT_S)
        except GetTimeoutError as error:
            device = next(device for device in self._config.devices if device.name == name)
            raise StartError(
                f'device "{name}" was not scheduled within {START_TIMEOUT_S:g} s; no alive node offers '
                f"{wishes(device)}? see `ray status`"
            ) from error


def unwrapped(reference: Any, timeout_s: float) -> Any:
    """``ray.get`` with our own errors unwrapped."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RaymoeError):
            raise error.cause from None
        raise


def answers(asked: Iterable[Any], timeout_s: float) -> dict[Any, Any]:
    """By reference, what came in time and is no failure; the others are left out, and failures logged."""
    references = list(asked)
    done, _ = ray.wait(references, num_returns=len(references), timeout=timeout_s) if references else ([], [])
    found = {}
    for reference in done:
        try:
            found[reference] = ray.get(reference)
        except RayError as error:
            log.warning("a worker failed to do what it was asked: %s", error)
    return found
