"""One layer's experts, wherever they are: split by owner, send, gather, put back in order.

No remote call decides anything here: the owners' table is in this process, one message goes to each worker
involved, and nothing is created per expert. A ``local`` worker costs a function call.

T tokens, K experts per token, P = T * K pairs, H hidden.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from raymoe.engine.directory import Directory, View, by_fleet, by_primary
from raymoe.engine.exchange import Answered, Exchange
from raymoe.engine.here import CallsHere, Part
from raymoe.engine.holdings import Changes, Holdings
from raymoe.engine.splitting import by_worker, subset
from raymoe.engine.suspects import Suspects
from raymoe.engine.workers import LocalWorker, RemoteWorkers
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder
from raymoe.placement.assignment import Fleet, reassign
from raymoe.placement.owners import NOBODY
from raymoe.placement.ownership import Ownership
from raymoe.transport.shadow_messages import Plan
from raymoe.types import DeviceName, ExpertKey, LayerSize, Routing, StepId

OnAnswer = Callable[[int, int, ExpertAnswer, float | None], None]
"""Told of an answer: worker, bytes sent to it, the answer, and the round trip where nothing else was waited for."""


def nothing() -> None:
    """What there is to do while workers load, where there is nothing."""


class Dispatcher:
    """Asks the owners of experts. Used by one thread, but for ``adopt``, ``suspects`` and the counts.

    Attributes:
        on_round_trip: told of each small call to a remote worker that needed no load: its device, and the seconds that
            it took but for computing.
        on_suspect: called when a worker falls silent.
        on_fleet: told of each new fleet.

    Args:
        owners: whom to ask for each expert while all are well.
        ownership: all that own it; omitted: nobody else does.
        max_rows: tokens per message; longer prompts go in several, so that messages stay bounded.
        bounded: remote devices with slots; the others hold all of their experts ready.
        fleet: where nothing stays resident, the workers, any owner of an expert among whom may be asked for it;
            ``owners`` is of no account then. None: its owner by that table is asked.
        devices: all workers that there may be, in their order, which is the fleet's.
    """

    def __init__(
        self,
        sizes: tuple[LayerSize, ...],
        owners: Mapping[ExpertKey, DeviceName],
        *,
        local: Mapping[DeviceName, LocalWorker],
        remote: RemoteWorkers | None,
        timeout_s: float,
        ownership: Ownership | None = None,
        max_rows: int = 2048,
        on_changes: Callable[[Changes], None] | None = None,
        bounded: Collection[DeviceName] = (),
        fleet: Fleet | None = None,
        devices: Sequence[DeviceName] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local = local
        self._remote = remote
        self._max_rows = max_rows
        self._zeros = np.zeros(max(size.top_k for size in sizes), dtype=np.int32)
        self._cost = Routing()
        self._gave_way: dict[DeviceName, int] = {}
        self._posted: View | None = None
        self._posting = threading.Lock()
        self.on_round_trip: Callable[[DeviceName, float], None] | None = None
        self.on_suspect: Callable[[], None] = nothing
        self.on_fleet: Callable[[Fleet], None] = lambda fleet: None
        if ownership is None:
            ownership = by_primary(owners) if fleet is None else by_fleet(fleet, devices)
        self._directory = Directory(sizes, View(ownership=ownership, primary=owners), devices, fleet)
        self._directory.on_fleet = lambda fleet: self.on_fleet(fleet)
        self._holdings = Holdings(local, bounded, on_changes)
        self._know_holdings()
        self._suspects = Suspects(remote, clock)
        self._suspects.on_change = lambda: self._directory.avoid(self._suspects.names)
        self._suspects.on_suspect = lambda: self.on_suspect()
        self._exchange = Exchange(
            self._directory,
            self._holdings,
            self._suspects,
            local=local,
            remote=remote,
            timeout_s=timeout_s,
            on_answer=self.account,
            catch_up=self.catch_up,
            clock=clock,
        )
        self._here = CallsHere(local, self._directory, self._exchange)

    # --- owners -------------------------------------------------------------------------------------------

    def adopt(self, view: View) -> None:
        """Ask by this from the next step on, or as soon as an answer is waited for. From any thread."""
        with self._posting:
            self._posted = view

    def catch_up(self) -> set[DeviceName]:
        """Go by what was to be adopted, if anything was; returns workers whose connection is another one now."""
        if self._posted is None:
            return set()
        with self._posting:
            view, self._posted = self._posted, None
        moved = self._remote.connect(view.endpoints) if self._remote is not None else set()
        self._directory.adopt(view)
        self._holdings.forget(moved)
        self._know_holdings()
        self._suspects.forget(moved)
        return moved

    def look(self) -> None:
        """Between steps: take in news of owners, and whether suspects answer again."""
        self.catch_up()
        if self._suspects.names:
            self._suspects.look()

    def has(self, experts: Collection[tuple[int, int]]) -> bool:
        """Whether there is somebody to ask for all of these: (layer, expert)."""
        return self._directory.has(experts)

    def lost(self, layer: int) -> np.ndarray | None:
        """Bool [E]: the experts of a layer that nobody can be asked for; None where there are none."""
        return self._directory.lost(layer)

    @property
    def suspects(self) -> tuple[DeviceName, ...]:
        """Workers that are silent."""
        return tuple(sorted(self._suspects.names))

    @property
    def rerouted(self) -> int:
        """Calls that were handed out again so far."""
        return self._exchange.rerouted

    @property
    def late_answers(self) -> int:
        """Answers that came when nobody waited for them any more, and were dropped."""
        return self._remote.late_answers if self._remote is not None else 0

    def _know_holdings(self) -> None:
        for worker, name in enumerate(self._directory.names):
            self._holdings.own(name, self._directory.owned_by(worker))

    # --- what is known of workers --------------------------------------------------------------------------

    @property
    def max_rows(self) -> int:
        """Tokens per message at most."""
        return self._max_rows

    @property
    def fleet(self) -> Fleet | None:
        """As given, with what is owned now; who is avoided owns nothing."""
        return self._directory.fleet

    @property
    def devices(self) -> tuple[DeviceName, ...]:
        """The workers' names, in the order of the fleet where there is one."""
        return self._directory.names

    @property
    def only_worker(self) -> LocalWorker | None:
        """The worker, where there is one and it is in this process."""
        names = self.devices
        return self._local.get(names[0]) if len(names) == 1 else None

    def assume_resident(self, name: DeviceName, identifiers: Collection[int]) -> None:
        """Experts that a bounded device had in its slots before this engine asked it for anything."""
        self._holdings.assume(name, identifiers)

    def available(self, layer: int) -> np.ndarray:
        """Bool per expert of the layer: whether its owner has it ready, as far as is known here."""
        only = self.only_worker
        if only is not None:
            return only.ready(layer)
        owner_E = self._directory.owner_LE[layer]
        available_E = np.zeros(len(owner_E), dtype=bool)
        for worker, name in enumerate(self.devices):
            available_E |= self._holdings.ready(name, layer) & (owner_E == worker)
        return available_E

    def holding(self, layer: int) -> np.ndarray:
        """Bool [W, E] of a fleet: what each worker has in its slots, as far as is known here."""
        assert self.fleet is not None
        held_WE = np.stack([self._holdings.ready(name, layer) for name in self.devices[: self.fleet.workers]])
        return held_WE & self.fleet.owners_LWE[layer]

    def loads_s(self) -> list[float | None]:
        """Seconds to load one expert on each device, as measured lately; None where that is not known."""
        return [self._holdings.load_s(name) for name in self.devices]

    def load_s(self) -> float | None:
        """Seconds to load one expert on the slowest device, as measured lately; None where none is known."""
        return self._holdings.slowest_load_s()

    def by_owner(self, layer: int, experts: np.ndarray) -> dict[DeviceName, np.ndarray]:
        """Which of ``experts`` each device is asked for, as a mask over them."""
        if len(self.devices) == 1:
            return {self.devices[0]: np.ones(len(experts), dtype=bool)}
        owners = self._directory.owner_LE[layer][experts]
        return {self.devices[worker]: owners == worker for worker in np.unique(owners).tolist() if worker != NOBODY}

    def gave_way(self, layer: int, experts: np.ndarray) -> None:
        """These experts of the router's choice were replaced by others."""
        for worker in self._directory.owner_LE[layer][experts].tolist():
            if worker != NOBODY:
                name = self.devices[worker]
                self._gave_way[name] = self._gave_way.get(name, 0) + 1

    def substituted(self) -> dict[DeviceName, int]:
        """By device, the (token, expert) pairs of the router that would have been its to compute, but were replaced."""
        return {name: self._gave_way.get(name, 0) for name in self.devices}

    # --- asking -------------------------------------------------------------------------------------------

    def listen(self, action: Callable[[], None]) -> None:
        """Do something again and again while remote workers are waited for. It must not ask for experts itself."""
        self._exchange.while_waiting = action

    def compute(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        scores_E: np.ndarray | None = None,
        meanwhile: Callable[[], None] = nothing,
        *,
        step: StepId | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """Unweighted output of every chosen expert, [T, K, H], on the device of ``hidden_TH``.

        Args:
            scores_E: mean gate score of every expert in this step, for the workers' eviction.
            meanwhile: done once, when the workers have begun to load.
            step: the forward that this is for, where orders were sent for it.
            plan: who was told to load which experts for this layer of it.

        Raises:
            ExpertLostError: nobody can be asked for an expert.
            ExpertUnavailableError: a worker fails, or does not answer in time though it lives.
        """
        tokens, k = experts_TK.shape
        if tokens > self._max_rows:
            parts = zip(hidden_TH.split(self._max_rows), experts_TK.split(self._max_rows), strict=True)
            outputs = [self.compute(layer, hidden, experts, scores_E, step=step) for hidden, experts in parts]
            meanwhile()
            return torch.cat(outputs)
        experts_P = experts_TK.reshape(-1).cpu().numpy().astype(np.int32)
        worker_P = self._hand_out(layer, experts_P, plan)
        calls: list[Part]
        if tokens == 1 and (worker_P == worker_P[0]).all():
            rows_P = self._zeros[:k] if k <= len(self._zeros) else np.zeros(k, dtype=np.int32)
            call = ExpertCall(
                layer=layer, hidden_RH=hidden_TH, experts_P=experts_P, rows_P=rows_P, scores_E=scores_E, step=step
            )
            calls = [(int(worker_P[0]), call, None)]
        else:
            rows_P = np.repeat(np.arange(tokens, dtype=np.int32), k)
            calls = [
                (worker, subset(layer, hidden_TH, experts_P[mine_P], rows_P[mine_P], scores_E, step), mine_P)
                for worker, mine_P in by_worker(experts_P, worker_P)
            ]
        done = self._ask(calls, len(experts_P), meanwhile)
        for answered in done:
            self._time(answered)
        return self._joined(done, len(experts_P), hidden_TH.device).view(tokens, k, -1)

    def compute_parts(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        parts: Sequence[tuple[int, np.ndarray]],
        step: StepId | None,
        on_answer: OnAnswer,
    ) -> torch.Tensor:
        """As ``compute``, split as the caller says. Each part is a message of its own; none waits for another's answer.

        Args:
            parts: worker of the fleet and pairs (places in ``experts_TK``, flattened), in the order of sending.
        """
        tokens, k = experts_TK.shape
        experts_P = experts_TK.reshape(-1).cpu().numpy().astype(np.int32)
        rows_P = np.repeat(np.arange(tokens, dtype=np.int32), k)
        calls: list[Part] = [
            (worker, subset(layer, hidden_TH, experts_P[mine_P], rows_P[mine_P], None, step), mine_P)
            for worker, mine_P in parts
        ]
        done = self._ask(calls, len(experts_P), nothing)
        for answered in done:
            asked, answer = answered.asked, answered.answer
            is_remote = asked.name not in self._local
            round_trip_s = answered.arrived_s - asked.sent_s if asked.is_alone and is_remote else None
            sent_bytes = asked.call.hidden_RH.nbytes if is_remote else 0
            on_answer(asked.worker, sent_bytes, answer, None if answer.misses or asked.doubts else round_trip_s)
        return self._joined(done, len(experts_P), hidden_TH.device).view(tokens, k, -1)

    def _hand_out(self, layer: int, experts_P: np.ndarray, plan: Plan | None) -> np.ndarray:
        """The worker of each pair [P]; in a fleet any owner of its expert may be asked."""
        owner_E, fleet = self._directory.owner_LE[layer], self.fleet
        if fleet is None:
            owner_P: np.ndarray = owner_E[experts_P]
            return owner_P
        needed_N, index_P = np.unique(experts_P, return_inverse=True)
        owned_N = owner_E[needed_N] != NOBODY
        planned = {} if plan is None else dict(zip(plan.experts_N.tolist(), plan.workers_N.tolist(), strict=True))
        worker_N = np.full(len(needed_N), NOBODY, dtype=np.int64)
        worker_N[owned_N] = reassign(needed_N[owned_N], planned, layer, fleet)
        return worker_N[index_P]

    def _ask(self, calls: list[Part], pairs: int, meanwhile: Callable[[], None]) -> list[Answered]:
        """Send to remote workers first, compute local ones meanwhile, then gather."""
        try:
            here: list[Part] = []
            for part in calls:
                worker, call, mine_P = part
                if worker != NOBODY and self.devices[worker] in self._local:
                    here.append(part)
                else:
                    self._exchange.send(worker, call, mine_P)
            if here:
                self._here.compute(here, meanwhile)
            else:
                meanwhile()
            return self._exchange.gather(pairs)
        finally:
            self._exchange.clear()

    def _joined(self, done: list[Answered], pairs: int, device: torch.device) -> torch.Tensor:
        """The output of every pair [P, H]."""
        first = done[0]
        if len(done) == 1 and first.asked.pairs_P is None and first.counts_P is None:
            return first.answer.output_PH.to(device)
        some_PH = first.answer.output_PH
        output_PH = torch.empty((pairs, some_PH.shape[1]), dtype=some_PH.dtype, device=device)
        for answered in done:
            answered.put_into(output_PH)
        return output_PH

    def _time(self, answered: Answered) -> None:
        """Tell how long a call was on its way, where it waited for no load."""
        asked, answer = answered.asked, answered.answer
        if self.on_round_trip is None or asked.name in self._local or answer.misses or asked.doubts:
            return
        self.on_round_trip(asked.name, max(0.0, answered.arrived_s - asked.sent_s - answer.compute_s))

    # --- orders and forecasts ------------------------------------------------------------------------------

    def order(self, name: DeviceName, order: LoadOrder) -> None:
        """Tell a worker which experts to have in its slots when a step comes to a layer. Never waits."""
        worker = self._local.get(name)
        if worker is not None:
            worker.order(order)
        elif self._remote is not None:
            self._remote.order(name, order)

    def order_here(self, plan: Plan) -> None:
        """Tell the workers in this process what a plan of another wants of them."""
        for worker in np.unique(plan.workers_N).tolist():
            name = self.devices[worker]
            if name in self._local:
                mine_N = plan.experts_N[plan.workers_N == worker]
                self._local[name].order(LoadOrder(step=plan.step, epoch=plan.epoch, layer=plan.layer, experts=mine_N))

    def forget(self, sequence: int) -> None:
        """Tell the workers of a fleet that a sequence is finished."""
        for name in self.devices if self.fleet is not None else ():
            worker = self._local.get(name)
            if worker is not None:
                worker.forget(sequence)
            elif self._remote is not None:
                self._remote.forget(name, sequence)

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """Pass a forecast for a layer to come on to the local owners. Remote ones get theirs from the placement."""
        for name, mine in self.by_owner(layer, experts).items():
            if name in self._local:
                self._local[name].expect(layer, experts[mine], scores[mine])

    def preview(self, pairs: int) -> torch.Tensor | None:
        """While workers load: the output of every pair [P, H] that needs no load, zeros for the others.

        None where no worker in this process loads anything.
        """
        return self._here.preview(pairs)

    def account(self, name: DeviceName, answer: ExpertAnswer) -> None:
        """Add what a worker's answer says of costs, residency and its link."""
        self._cost += Routing(
            hits=answer.hits,
            misses=answer.misses,
            hosted=answer.hosted,
            loads=answer.loads,
            bytes_loaded=answer.bytes_loaded,
            calls=1,
        )
        self._holdings.note(name, answer)

    def take_cost(self) -> Routing:
        """What calls cost since the last take; also passes residency changes on."""
        cost, self._cost = self._cost, Routing()
        self._holdings.publish()
        return cost
