"""One layer's experts, wherever they are: split by owner, send, gather, put back in order.

No remote call decides anything here: the owners' table is in this process, one message goes to each worker
involved, and nothing is created per expert. A ``local`` worker costs a function call.

T tokens, K experts per token, P = T * K pairs, H hidden.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from raymoe.engine.holdings import Changes, Holdings
from raymoe.engine.splitting import by_worker, subset
from raymoe.engine.workers import LocalWorker, RemoteWorkers
from raymoe.errors import ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder
from raymoe.experts.worker import Begun
from raymoe.placement.assignment import Fleet, reassign
from raymoe.transport.shadow_messages import Plan
from raymoe.types import DeviceName, ExpertKey, LayerSize, Routing, StepId

OnAnswer = Callable[[int, int, ExpertAnswer, float | None], None]
"""Told of an answer: worker, bytes sent to it, the answer, and the round trip where nothing else was waited for."""

UnderWay = tuple[LocalWorker, Begun, np.ndarray | None]
"""A call that has begun: whose, and which of all pairs are its; None is all of them in order."""


def nothing() -> None:
    """What there is to do while workers load, where there is nothing."""


class Dispatcher:
    """Asks the owners of experts. Used by one thread.

    Attributes:
        fleet: as given.
        on_round_trip: told of each small call to a remote worker that needed no load: its device, and the seconds that
            it took but for computing.

    Args:
        owners: whom to ask for each expert.
        max_rows: tokens per message; longer prompts go in several, so that messages stay bounded.
        bounded: remote devices with slots; the others hold all of their experts ready.
        fleet: where nothing stays resident, the workers, any owner of an expert among whom may be asked for it;
            ``owners`` is of no account then. None: its owner by that table is asked.
        devices: the fleet's, in its order.
    """

    def __init__(
        self,
        sizes: tuple[LayerSize, ...],
        owners: Mapping[ExpertKey, DeviceName],
        *,
        local: Mapping[DeviceName, LocalWorker],
        remote: RemoteWorkers | None,
        timeout_s: float,
        max_rows: int = 2048,
        on_changes: Callable[[Changes], None] | None = None,
        bounded: Collection[DeviceName] = (),
        fleet: Fleet | None = None,
        devices: Sequence[DeviceName] = (),
    ) -> None:
        self._local = local
        self._remote = remote
        self._timeout_s = timeout_s
        self._max_rows = max_rows
        self._holdings = Holdings(local, bounded, on_changes)
        self._zeros = np.zeros(max(size.top_k for size in sizes), dtype=np.int32)
        self._cost = Routing()
        self._under_way: list[UnderWay] = []
        self.fleet = fleet
        self.on_round_trip: Callable[[DeviceName, float], None] | None = None
        self.set_owners(sizes, owners)
        if fleet is not None:
            self._names = list(devices)
            for worker, name in enumerate(self._names):
                self._holdings.own(name, [owners_WE[worker] for owners_WE in fleet.owners_LWE])

    @property
    def max_rows(self) -> int:
        """Tokens per message at most."""
        return self._max_rows

    @property
    def devices(self) -> tuple[DeviceName, ...]:
        """The workers' names, in the order of the fleet where there is one."""
        return tuple(self._names)

    @property
    def only_worker(self) -> LocalWorker | None:
        """The worker, where there is one and it is in this process."""
        return self._local.get(self._names[0]) if len(self._names) == 1 else None

    def set_owners(self, sizes: tuple[LayerSize, ...], owners: Mapping[ExpertKey, DeviceName]) -> None:
        """Ask these workers from the next call on. Raises ExpertUnavailableError for an expert without one."""
        names = sorted(set(owners.values()))
        number = {name: index for index, name in enumerate(names)}
        table = [np.full(size.experts, -1, dtype=np.int16) for size in sizes]
        for key, name in owners.items():
            table[key.layer][key.expert] = number[name]
        for layer, row in enumerate(table):
            if (row < 0).any():
                raise ExpertUnavailableError(f"layer {layer}: expert {int(np.argmin(row))} has no owner")
        self._names, self._owner = names, table
        self._gave_way = [0] * len(names)
        if self.fleet is None:
            for name in names:
                self._holdings.own(name, [row == number[name] for row in table])

    def assume_resident(self, name: DeviceName, identifiers: Collection[int]) -> None:
        """Experts that a bounded device had in its slots before this engine asked it for anything."""
        self._holdings.assume(name, identifiers)

    def available(self, layer: int) -> np.ndarray:
        """Bool per expert of the layer: whether its owner has it ready, as far as is known here."""
        if len(self._names) == 1 and self._names[0] in self._local:
            return self._local[self._names[0]].ready(layer)
        available_E = np.zeros(len(self._owner[layer]), dtype=bool)
        for index, name in enumerate(self._names):
            available_E |= self._holdings.ready(name, layer) & (self._owner[layer] == index)
        return available_E

    def holding(self, layer: int) -> np.ndarray:
        """Bool [W, E] of a fleet: what each worker has in its slots, as far as is known here."""
        return np.stack([self._holdings.ready(name, layer) for name in self._names])

    def loads_s(self) -> list[float | None]:
        """Seconds to load one expert on each device, as measured lately; None where that is not known."""
        return [self._holdings.load_s(name) for name in self._names]

    def listen(self, action: Callable[[], None]) -> None:
        """Do something again and again while remote workers are waited for. It must not ask for experts itself."""
        if self._remote is not None:
            self._remote.while_waiting = action

    def load_s(self) -> float | None:
        """Seconds to load one expert on the slowest device, as measured lately; None where none is known."""
        return self._holdings.slowest_load_s()

    def by_owner(self, layer: int, experts: np.ndarray) -> dict[DeviceName, np.ndarray]:
        """Which of ``experts`` each device owns, as a mask over them."""
        if len(self._names) == 1:
            return {self._names[0]: np.ones(len(experts), dtype=bool)}
        owners = self._owner[layer][experts]
        return {self._names[index]: owners == index for index in np.unique(owners).tolist()}

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
        """
        tokens, k = experts_TK.shape
        if tokens > self._max_rows:
            parts = zip(hidden_TH.split(self._max_rows), experts_TK.split(self._max_rows), strict=True)
            outputs = [self.compute(layer, hidden, experts, scores_E, step=step) for hidden, experts in parts]
            meanwhile()
            return torch.cat(outputs)
        experts_P = experts_TK.reshape(-1).cpu().numpy().astype(np.int32)
        hand_out = self.fleet is not None
        owner_P = self._hand_out(layer, experts_P, plan) if hand_out else self._owner[layer][experts_P]
        if tokens == 1:
            rows_P = self._zeros[:k] if k <= len(self._zeros) else np.zeros(k, dtype=np.int32)
            if (owner_P == owner_P[0]).all():
                call = ExpertCall(
                    layer=layer, hidden_RH=hidden_TH, experts_P=experts_P, rows_P=rows_P, scores_E=scores_E, step=step
                )
                return self._ask_one(self._names[owner_P[0]], call, hidden_TH.device, meanwhile).view(1, k, -1)
        else:
            rows_P = np.repeat(np.arange(tokens, dtype=np.int32), k)
            if len(self._names) == 1 or (owner_P == owner_P[0]).all():
                return self._ask_one_for_all(layer, hidden_TH, experts_P, rows_P, owner_P[0], scores_E, step, meanwhile)
        calls = {
            self._names[worker]: (mine_P, subset(layer, hidden_TH, experts_P[mine_P], rows_P[mine_P], scores_E, step))
            for worker, mine_P in by_worker(experts_P, owner_P)
        }
        return self._ask_all(calls, len(experts_P), hidden_TH.device, meanwhile).view(tokens, k, -1)

    def gave_way(self, layer: int, experts: np.ndarray) -> None:
        """These experts of the router's choice were replaced by others."""
        for owner in self._owner[layer][experts].tolist():
            self._gave_way[owner] += 1

    def substituted(self) -> dict[DeviceName, int]:
        """By device, the (token, expert) pairs of the router that would have been its to compute, but were replaced."""
        return dict(zip(self._names, self._gave_way, strict=True))

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
        calls = [subset(layer, hidden_TH, experts_P[mine_P], rows_P[mine_P], None, step) for _, mine_P in parts]
        requests: dict[int, DeviceName] = {}
        sent: dict[int, tuple[int, float]] = {}
        answers: dict[int, ExpertAnswer] = {}
        for number, ((worker, _), call) in enumerate(zip(parts, calls, strict=True)):
            name = self._names[worker]
            if name not in self._local:
                assert self._remote is not None, "a device is either local or remote"
                request = self._remote.send(name, call)
                requests[request], sent[request] = name, (number, time.monotonic())
        for number, ((worker, _), call) in enumerate(zip(parts, calls, strict=True)):
            local = self._local.get(self._names[worker])
            if local is not None:
                answers[number] = local.finish(local.begin(call))
                on_answer(worker, 0, answers[number], None)
        if requests:
            assert self._remote is not None
            arrived_s: dict[int, float] = {}
            gathered = self._remote.gather(requests, self._timeout_s, arrived_s)
            first = {worker: number for number, (worker, _) in reversed(list(enumerate(parts)))}
            for request, answer in gathered.items():
                number, sent_s = sent[request]
                worker, alone = parts[number][0], first[parts[number][0]] == number and not answer.misses
                answers[number] = answer
                round_trip_s = arrived_s[request] - sent_s if alone else None
                on_answer(worker, calls[number].hidden_RH.nbytes, answer, round_trip_s)
        output_PH = hidden_TH.new_empty((len(experts_P), answers[0].output_PH.shape[1]))
        for number, answer in answers.items():
            output_PH[torch.from_numpy(parts[number][1]).to(output_PH.device)] = answer.output_PH.to(output_PH.device)
            self.account(self._names[parts[number][0]], answer)
        return output_PH.view(tokens, k, -1)

    def _hand_out(self, layer: int, experts_P: np.ndarray, plan: Plan | None) -> np.ndarray:
        """The worker of each pair [P], where any owner of its expert may be asked."""
        assert self.fleet is not None
        needed_N, index_P = np.unique(experts_P, return_inverse=True)
        planned = {} if plan is None else dict(zip(plan.experts_N.tolist(), plan.workers_N.tolist(), strict=True))
        return reassign(needed_N, planned, layer, self.fleet)[index_P]

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
            name = self._names[worker]
            if name in self._local:
                mine_N = plan.experts_N[plan.workers_N == worker]
                self._local[name].order(LoadOrder(step=plan.step, epoch=plan.epoch, layer=plan.layer, experts=mine_N))

    def forget(self, sequence: int) -> None:
        """Tell the workers of a fleet that a sequence is finished."""
        for name in self._names if self.fleet is not None else ():
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

    def _ask_one_for_all(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        experts_P: np.ndarray,
        rows_P: np.ndarray,
        owner: int,
        scores_E: np.ndarray | None,
        step: StepId | None,
        meanwhile: Callable[[], None],
    ) -> torch.Tensor:
        """Every pair of several tokens, of one worker; pairs of one expert lie together."""
        order_P = np.argsort(experts_P, kind="stable")
        call = ExpertCall(
            layer=layer,
            hidden_RH=hidden_TH,
            experts_P=experts_P[order_P],
            rows_P=rows_P[order_P],
            scores_E=scores_E,
            step=step,
        )
        answered_PH = self._ask_one(self._names[owner], call, hidden_TH.device, meanwhile, order_P)
        output_PH = torch.empty_like(answered_PH)
        output_PH[torch.from_numpy(order_P).to(output_PH.device)] = answered_PH
        return output_PH.view(hidden_TH.shape[0], -1, output_PH.shape[1])

    def _ask_one(
        self,
        name: DeviceName,
        call: ExpertCall,
        device: torch.device,
        meanwhile: Callable[[], None],
        order_P: np.ndarray | None = None,
    ) -> torch.Tensor:
        """The answer of one worker; ``order_P`` are the places of its pairs among the layer's, where they differ."""
        worker = self._local.get(name)
        if worker is not None:
            begun = worker.begin(call)
            self._meanwhile(meanwhile, [(worker, begun, order_P)])
            answer = worker.finish(begun)
        else:
            assert self._remote is not None, "a device is either local or remote"
            start_s = time.monotonic()
            request = self._remote.send(name, call)
            meanwhile()
            answer = self._remote.gather({request: name}, self._timeout_s)[request]
            self._time({name: answer}, start_s)
        self.account(name, answer)
        return answer.output_PH.to(device)

    def _ask_all(
        self,
        calls: dict[DeviceName, tuple[np.ndarray, ExpertCall]],
        pairs: int,
        device: torch.device,
        meanwhile: Callable[[], None],
    ) -> torch.Tensor:
        """Send to remote workers first, compute local ones meanwhile, then gather."""
        requests: dict[int, DeviceName] = {}
        start_s = time.monotonic()
        for name, (_, call) in calls.items():
            if name not in self._local:
                assert self._remote is not None, "a device is either local or remote"
                requests[self._remote.send(name, call)] = name
        begun = {name: self._local[name].begin(call) for name, (_, call) in calls.items() if name in self._local}
        self._meanwhile(meanwhile, [(self._local[name], call, calls[name][0]) for name, call in begun.items()])
        answers = {name: self._local[name].finish(call) for name, call in begun.items()}
        if requests:
            assert self._remote is not None
            gathered = self._remote.gather(requests, self._timeout_s)
            remote = {requests[request]: answer for request, answer in gathered.items()}
            self._time(remote, start_s)
            answers.update(remote)
        first = next(iter(answers.values())).output_PH
        output_PH = torch.empty((pairs, first.shape[1]), dtype=first.dtype, device=device)
        for name, answer in answers.items():
            output_PH[torch.from_numpy(calls[name][0]).to(device)] = answer.output_PH.to(device)
            self.account(name, answer)
        return output_PH

    def _time(self, answers: Mapping[DeviceName, ExpertAnswer], start_s: float) -> None:
        """Tell how long calls were on their way, where none of them waited for a load."""
        if self.on_round_trip is not None and not any(answer.misses for answer in answers.values()):
            on_the_way_s = time.monotonic() - start_s - max(answer.compute_s for answer in answers.values())
            for name in answers:
                self.on_round_trip(name, max(0.0, on_the_way_s))

    def _meanwhile(self, action: Callable[[], None], under_way: list[UnderWay]) -> None:
        """Do something that may ask for a preview of the calls under way."""
        self._under_way = under_way
        try:
            action()
        finally:
            self._under_way = []

    def preview(self, pairs: int) -> torch.Tensor | None:
        """While workers load: the output of every pair [P, H] that needs no load, zeros for the others.

        None where no worker in this process loads anything.
        """
        if all(begun.ready_P.all() for _, begun, _ in self._under_way):
            return None
        hidden_RH = self._under_way[0][1].call.hidden_RH
        output_PH = hidden_RH.new_zeros((pairs, hidden_RH.shape[1]))
        for worker, begun, mine_P in self._under_way:
            ready_P, ready_PH = worker.preview(begun)
            known_P = np.flatnonzero(ready_P) if mine_P is None else mine_P[ready_P]
            output_PH[torch.from_numpy(known_P).to(output_PH.device)] = ready_PH.to(output_PH.device)
        return output_PH

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
