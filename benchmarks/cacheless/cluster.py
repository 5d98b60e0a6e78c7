"""A cluster of plain processes on this machine: workers and a shadow behind real sockets, the engine in this one.

Without Ray, so that its own processes don't share the two cores with what is measured. Links are emulated; their speed,
the shadow's alignment and its honesty can be changed between measurements without a restart. Every worker process
holds two workers over the same memory: one with everything resident, one with few slots.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from predictor.forecast import LayerForecast
from predictor.shadow import Alignment, ShadowCounts
from raymoe.actors.session import message_limits
from raymoe.actors.shares import bounded_devices, cluster_fleet, hand_out
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ClusterConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.experts.call import expert_id
from raymoe.experts.link import EmulatedLink
from raymoe.placement.ownership import Capacity, primary_owners
from raymoe.placement.pipelining import hidden_load_s
from raymoe.transport.client import WorkerClient
from raymoe.transport.shadow import ShadowClient
from raymoe.transport.sockets import KeyPair
from raymoe.types import DeviceName

ROW_MORE = 0.18  # of the time of one row: a pass of 9 positions takes 2.41 x one of a single position


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Emulated devices: what each takes at least in an MoE layer, a worker per expert. All of it is still computed.

    Ten processes on two cores measure how the cores are shared; devices of their own would not share them. A row more
    takes a device ``ROW_MORE`` of that longer, as it takes this machine (``benchmarks.passes``).
    """

    main_s: float = 0.0
    worker_s: float = 0.0
    shadow_s: float = 0.0


START_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured: a checkpoint in float32, ``workers`` in groups of ``group_size``, and a shadow of ``bits``.

    ``spare`` is how many slots each worker has beyond those that experts pass through; ``drafts`` how many tokens of
    the shadow a pass of the model verifies at most. Policy importance has no shadow, and is foretold by gates.
    """

    model: Path
    workers: int
    group_size: int
    top_k: int
    bits: int
    policy: str = "on_demand_shadow"
    spare: int = 0
    drafts: int = 0
    alpha: float = 0.25

    @property
    def loads(self) -> int:
        """Experts that a worker loads for a layer."""
        return -(-self.top_k // self.group_size)

    @property
    def slots(self) -> int:
        """Of each worker: those, one to load into meanwhile, and what is to spare."""
        return self.loads + 1 + self.spare

    @property
    def predictor(self) -> dict[str, Any] | None:
        """The shadow, in the words of a configuration."""
        return None if self.policy == "importance" else {"kind": "shadow", "bits": self.bits, "drafts": self.drafts}

    def hidden_load_s(self, main_s: float, worker_s: float) -> float:
        """The longest time of one load that costs nothing."""
        return hidden_load_s(self.workers, self.group_size, main_s, worker_s) / self.loads


class Far:
    """One process of the cluster, asked through a pipe."""

    def __init__(self, name: str, target: Any, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), name=name, daemon=True)
        self._process.start()
        theirs.close()  # so that both sides hear when the other one has ended

    def hear(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """What it says next."""
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"{self._process.name} says nothing for {timeout_s} s")
        return self._pipe.recv()

    def tell(self, something: Any) -> None:
        """Send it something."""
        self._pipe.send(something)

    def ask(self, *question: Any) -> Any:
        """Its answer."""
        self.tell(question)
        return self.hear()

    def end(self) -> None:
        """End it."""
        self.tell(("stop",))
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


class Metronome:
    """Lets nothing end sooner than some beats of ``beat_s`` after it has begun. Used by one thread."""

    def __init__(self) -> None:
        self.beat_s = 0.0
        self._last_s = 0.0

    def wait(self, beats: float = 1.0) -> None:
        """Until so many beats have passed since the last one."""
        remaining_s = self._last_s + beats * self.beat_s - time.perf_counter()
        if remaining_s > 0:
            time.sleep(remaining_s)

    def start(self) -> None:
        """The next beat is due that long after now."""
        self._last_s = time.perf_counter()


def settle_down() -> None:
    """One thread of torch, as a small device has to spare."""
    torch.set_num_threads(1)


def heard(pipe: Connection) -> tuple[Any, ...]:
    """What the main process asks; to stop, where it has ended without a word."""
    try:
        question: tuple[Any, ...] = pipe.recv()
    except (EOFError, ConnectionResetError):
        return ("stop",)
    return question


def run_worker(pipe: Connection, config: ClusterConfig, index: int, clients: set[bytes]) -> None:
    """A worker's process: both workers, each behind sockets of its own."""
    from raymoe.experts.build import make_worker
    from raymoe.transport.server import WorkerServer

    settle_down()
    checkpoint = open_checkpoint(config.model.source, config.model.dtype)
    limits, sizes = message_limits(checkpoint), checkpoint.sizes()
    device = config.devices[index]
    owned = ownership_of(config, sizes)[DeviceName(device.name)]
    bounded = make_worker(checkpoint, device, config.scheduling)
    bounded.own(owned)
    resident = make_worker(checkpoint, device.model_copy(update={"slot_memory": None, "link": None}))
    resident.own(owned)
    metronome = Metronome()
    for worker in (bounded, resident):
        keep_pace(worker, metronome)
    servers = {
        name: WorkerServer(worker, "127.0.0.1", limits, set(clients))
        for name, worker in (("bounded", bounded), ("resident", resident))
    }
    pipe.send({name: server.endpoint for name, server in servers.items()})
    while (question := heard(pipe))[0] != "stop":
        if question[0] == "link":
            assert isinstance(bounded._link, EmulatedLink)
            bounded._link.bytes_per_s = question[1]
            pipe.send(None)
        elif question[0] == "pace":
            metronome.beat_s = question[1].worker_s
            pipe.send(None)
        elif question[0] == "report":
            pipe.send(bounded.report())
        elif question[0] == "processor":
            pipe.send(time.process_time())
    for server in servers.values():
        server.close()
    bounded.close()
    resident.close()


def keep_pace(worker: Any, metronome: Metronome) -> None:
    """Let a worker's computing take as long as an emulated device's; its loads go on meanwhile."""

    def paced(compute: Any) -> Any:
        def compute_in_time(table: Any, index_P: np.ndarray, hidden_RH: torch.Tensor, rows_P: np.ndarray) -> Any:
            metronome.start()
            output_PH = compute(table, index_P, hidden_RH, rows_P)
            experts = len(np.unique(index_P))
            metronome.wait(experts + ROW_MORE * (len(index_P) - experts))
            return output_PH

        return compute_in_time

    worker._computes = [paced(compute) for compute in worker._computes]


def run_shadow(pipe: Connection, config: ClusterConfig, engine_key: bytes, keys: KeyPair) -> None:
    """The shadow's process."""
    import threading

    from raymoe.engine.shadow_host import ShadowHost, alignment_of, build_shadow_model
    from raymoe.transport.shadow import ShadowServer

    settle_down()
    assert config.predictor is not None
    checkpoint = open_checkpoint(config.model.source, config.model.dtype)
    limits, sizes = message_limits(checkpoint), checkpoint.sizes()
    model = build_shadow_model(config.model, config.predictor)
    server = ShadowServer("127.0.0.1", limits)
    server.clients.keys.add(engine_key)
    decides = config.scheduling.policy != "joint"
    host = ShadowHost(model, alignment_of(config.predictor), server, decides=decides)
    honest = host.shadow.on_forecast
    pipe.send((server.endpoint, model.nbytes))
    endpoints = pipe.recv()
    names = [DeviceName(device.name) for device in config.devices]
    fleet = cluster_fleet(config, sizes, ownership_of(config, sizes))
    host.connect(endpoints, lambda: WorkerClient(endpoints, keys, limits), fleet, names)
    thread = threading.Thread(target=host.run, name="shadow", daemon=True)
    thread.start()
    pipe.send("ready")
    random, metronome = np.random.default_rng(0), Metronome()
    routed = model.on_routed

    def in_time(*arguments: Any) -> None:
        metronome.wait()
        metronome.start()
        routed(*arguments)

    model.on_routed = in_time

    def at_random(forecast: LayerForecast) -> None:
        """As many experts as were forecast, any of them."""
        shape, experts = forecast.experts_TK.shape, forecast.scores_TE.shape[1]
        drawn = np.stack([random.choice(experts, shape[1], replace=False) for _ in range(shape[0])])
        honest(replace(forecast, experts_TK=drawn))

    while (question := heard(pipe))[0] != "stop":
        if question[0] == "align":
            host.shadow.alignment = question[1]
            host.shadow.on_forecast = at_random if question[2] else honest
            pipe.send(None)
        elif question[0] == "pace":
            metronome.beat_s = question[1].shadow_s
            pipe.send(None)
        elif question[0] == "counts":
            pipe.send((host.shadow.counts, host.failure and str(host.failure)))
        elif question[0] == "processor":
            pipe.send(time.process_time())
    host.stop()
    thread.join(timeout=10)
    server.close()


def ownership_of(config: ClusterConfig, sizes: Any) -> Any:
    """Every worker owns what its memory holds, which here is everything."""
    capacities = [Capacity(device=DeviceName(device.name), host_bytes=1 << 40) for device in config.devices]
    return hand_out(config, sizes, capacities, 1)


class Cluster:
    """All processes, and a service for each way to use them.

    Attributes:
        foretold, unforetold, resident: engines over the same workers: with forecasts, without any, and with every
            expert resident at the same workers (hand-out as without a cache, so that messages are alike).
        shadow_bytes: of the shadow's weights, 0 without one.
    """

    def __init__(self, setup: Setup, stack: ExitStack) -> None:
        self.setup = setup
        self._metronome = Metronome()
        self._load_s = math.inf  # until it is set
        self.checkpoint = open_checkpoint(setup.model, "float32")
        self.sizes = self.checkpoint.sizes()
        self.expert_bytes = max(size.expert_bytes for size in self.sizes)
        self.config = self._config(setup.policy, setup.predictor)
        self._names = [DeviceName(device.name) for device in self.config.devices]
        self._ownership = ownership_of(self.config, self.sizes)
        self._fleet = cluster_fleet(self.config, self.sizes, self._ownership)
        self._limits = message_limits(self.checkpoint)
        keys, shadow_keys = KeyPair.create(), KeyPair.create()
        admitted = {keys.public, shadow_keys.public}
        self._shadow = None
        if setup.predictor is not None:
            self._shadow = Far("shadow", run_shadow, self.config, keys.public, shadow_keys)
            stack.callback(self._shadow.end)
        self._workers = [Far(name, run_worker, self.config, index, admitted) for index, name in enumerate(self._names)]
        for worker in self._workers:
            stack.callback(worker.end)
        endpoints = [worker.hear(START_TIMEOUT_S) for worker in self._workers]
        bounded, resident = (
            {name: found[kind] for name, found in zip(self._names, endpoints, strict=True)}
            for kind in ("bounded", "resident")
        )
        link, self.shadow_bytes = None, 0
        if self._shadow is not None:
            shadow_endpoint, self.shadow_bytes = self._shadow.hear(START_TIMEOUT_S)
            self._shadow.tell(bounded)
            self._shadow.hear(START_TIMEOUT_S)
            link = ShadowClient(shadow_endpoint, keys, self._limits, setup.workers)
            stack.callback(link.close)
        self.foretold = self._service(stack, WorkerClient(bounded, keys, self._limits), self.config, link)
        plain = self._config("on_demand_shadow", None)
        self.resident = self._service(stack, WorkerClient(resident, keys, self._limits), plain, None)
        if setup.policy == "on_demand_shadow":
            self.unforetold = self._service(stack, WorkerClient(bounded, keys, self._limits), plain, None)

    def _config(self, policy: str, predictor: dict[str, Any] | None) -> ClusterConfig:
        setup = self.setup
        device = {"slot_memory": self.expert_bytes * setup.slots, "link": {"bytes_per_s": "1GB"}}
        return ClusterConfig.parse(
            {
                "model": {"path": str(setup.model), "dtype": "float32"},
                "devices": [{"name": f"w{index}", **device} for index in range(setup.workers)],
                "scheduling": {"policy": policy, "group_size": setup.group_size, "alpha": setup.alpha},
                "predictor": predictor,
                "trunk": {"threads": 1},
            }
        )

    def _service(
        self, stack: ExitStack, client: WorkerClient, config: ClusterConfig, link: ShadowClient | None
    ) -> ModelService:
        stack.callback(client.close)
        owners = primary_owners(self.sizes, self._ownership, [1] * len(self.sizes))
        by_gates = config.scheduling.policy == "importance"
        dispatcher = Dispatcher(
            self.sizes,
            owners,
            local={},
            remote=client,
            timeout_s=120.0,
            bounded=bounded_devices(config),
            fleet=None if by_gates else self._fleet,
            devices=self._names,
        )

        def tell_owners(layer: int, experts: np.ndarray, worth: np.ndarray) -> None:
            for name, mine in dispatcher.by_owner(layer, experts).items():
                identifiers = [expert_id(layer, expert) for expert in experts[mine].tolist()]
                client.prefetch(name, identifiers, worth[mine].tolist())

        own = dispatcher.compute

        def compute(*arguments: Any, **more: Any) -> torch.Tensor:
            answer = own(*arguments, **more)
            self._metronome.start()
            return answer

        dispatcher.compute = compute  # type: ignore[method-assign]
        on_forecast = tell_owners if by_gates else None
        service = ModelService(self.checkpoint, config, dispatcher, on_forecast=on_forecast, link=link)
        route = service.experts.route

        def route_in_time(layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
            self._metronome.wait(1 + ROW_MORE * (len(experts_TK) - 1))
            return route(layer, experts_TK, weights_TK)

        service.experts.route = route_in_time  # type: ignore[method-assign]
        stack.callback(service.close)
        return service

    def set_load(self, load_s: float) -> None:
        """Let one load take so long on every link."""
        for worker in self._workers:
            worker.ask("link", self.expert_bytes / load_s)
        self._load_s = load_s

    @property
    def link_bytes_per_s(self) -> float:
        """Of all links together, as they are emulated now."""
        return self.setup.workers * self.expert_bytes / self._load_s

    def set_pace(self, pace: Pace) -> None:
        """Emulate devices of this pace; ``Pace()`` is as fast as this machine can."""
        self._metronome.beat_s = pace.main_s
        for far in (*self._workers, *([self._shadow] if self._shadow else [])):
            far.ask("pace", pace)

    def align(self, alignment: Alignment, *, at_random: bool = False) -> None:
        """How the shadow follows the model from the next sequence on, and whether it forecasts or draws lots."""
        if self._shadow is not None:
            self._shadow.ask("align", replace(alignment, drafts=self.setup.drafts), at_random)

    def counts(self) -> ShadowCounts:
        """The shadow's totals. Raises RuntimeError where it has failed."""
        assert self._shadow is not None, "there is no shadow to count"
        counts, failure = self._shadow.ask("counts")
        if failure:
            raise RuntimeError(f"the shadow failed: {failure}")
        return counts

    def processor_s(self) -> dict[str, float]:
        """Seconds of processor so far, by who used them."""
        workers_s = sum(worker.ask("processor") for worker in self._workers)
        shadow_s = 0.0 if self._shadow is None else self._shadow.ask("processor")
        return {"main": time.process_time(), "shadow": shadow_s, "workers": workers_s}

    @property
    def slot_bytes(self) -> int:
        """Memory for experts of all workers, where not everything is resident."""
        return self.setup.workers * self.setup.slots * self.expert_bytes

    def peak_slot_bytes(self) -> int:
        """What of it was in use at once, at most."""
        return sum(worker.ask("report").peak_slot_bytes for worker in self._workers)


@contextmanager
def cluster(setup: Setup) -> Iterator[Cluster]:
    """Start everything, and end it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    settle_down()
    with ExitStack() as stack:
        yield Cluster(setup, stack)
