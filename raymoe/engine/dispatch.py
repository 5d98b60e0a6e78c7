"""One layer's experts, wherever they are: split by owner, send, gather, put back in order.

No remote call decides anything here: the owners' table is in this process, one message goes to each worker
involved, and nothing is created per expert. A ``local`` worker costs a function call.

T tokens, K experts per token, P = T * K pairs, H hidden.
"""

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np
import torch

from raymoe.errors import ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, ExpertCall, layer_and_expert
from raymoe.experts.worker import Begun
from raymoe.types import DeviceName, ExpertKey, LayerSize, Routing


class LocalWorker(Protocol):
    """A worker in this process."""

    def begin(self, call: ExpertCall) -> Begun:
        """Start the loads of a call."""
        ...

    def finish(self, begun: Begun) -> ExpertAnswer:
        """Compute it."""
        ...

    def preview(self, begun: Begun) -> tuple[np.ndarray, torch.Tensor]:
        """Bool per pair of a call that has begun: whether it needs no load; and those pairs' outputs."""
        ...

    def ready(self, layer: int) -> np.ndarray:
        """Bool per expert: whether it needs no load."""
        ...

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """A forecast for a layer to come."""
        ...

    @property
    def load_s(self) -> float | None:
        """Seconds to load one expert."""
        ...


class RemoteWorkers(Protocol):
    """Workers in other processes."""

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        """Send a call; returns its request number."""
        ...

    def gather(self, requests: dict[int, DeviceName], timeout_s: float) -> dict[int, ExpertAnswer]:
        """Wait for answers."""
        ...


UnderWay = tuple[LocalWorker, Begun, np.ndarray | None]
"""A call that has begun: whose, and which of all pairs are its; None is all of them in order."""

Changes = dict[DeviceName, tuple[list[int], list[int]]]
"""Per device: ids of experts loaded and evicted."""


def nothing() -> None:
    """What there is to do while workers load, where there is nothing."""


class Dispatcher:
    """Asks the owners of experts. Used by one thread.

    Args:
        owners: whom to ask for each expert.
        max_rows: tokens per message; longer prompts go in several, so that messages stay bounded.
        bounded: remote devices with slots; the others hold all of their experts ready.
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
    ) -> None:
        self._local = local
        self._remote = remote
        self._timeout_s = timeout_s
        self._max_rows = max_rows
        self._on_changes = on_changes
        self._zeros = np.zeros(max(size.top_k for size in sizes), dtype=np.int32)
        self._cost = Routing()
        self._under_way: list[UnderWay] = []
        self._changes: Changes = {}
        self._bounded = frozenset(bounded)
        self._remote_load_s: dict[DeviceName, float] = {}
        self.set_owners(sizes, owners)

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
        self._resident = {
            name: [
                (row == number[name]) if name not in self._bounded else np.zeros(len(row), dtype=bool) for row in table
            ]
            for name in names
            if name not in self._local
        }

    def assume_resident(self, name: DeviceName, identifiers: Collection[int]) -> None:
        """Experts that a bounded device had in its slots before this engine asked it for anything."""
        for identifier in identifiers if name in self._bounded and name in self._resident else ():
            layer, expert = layer_and_expert(identifier)
            self._resident[name][layer][expert] = True

    def available(self, layer: int) -> np.ndarray:
        """Bool per expert of the layer: whether its owner has it ready, as far as is known here."""
        if len(self._names) == 1 and self._names[0] in self._local:
            return self._local[self._names[0]].ready(layer)
        available_E = np.zeros(len(self._owner[layer]), dtype=bool)
        for index, name in enumerate(self._names):
            worker = self._local.get(name)
            ready_E = worker.ready(layer) if worker is not None else self._resident[name][layer]
            available_E |= ready_E & (self._owner[layer] == index)
        return available_E

    def load_s(self) -> float | None:
        """Seconds to load one expert on the slowest device, as measured lately; None where none is known."""
        local = (seconds for worker in self._local.values() if (seconds := worker.load_s) is not None)
        return max((*local, *self._remote_load_s.values()), default=None)

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
    ) -> torch.Tensor:
        """Unweighted output of every chosen expert, [T, K, H], on the device of ``hidden_TH``.

        Args:
            scores_E: mean gate score of every expert in this step, for the workers' eviction.
            meanwhile: done once, when the workers have begun to load.
        """
        tokens, k = experts_TK.shape
        if tokens > self._max_rows:
            parts = zip(hidden_TH.split(self._max_rows), experts_TK.split(self._max_rows), strict=True)
            outputs = [self.compute(layer, hidden, experts, scores_E) for hidden, experts in parts]
            meanwhile()
            return torch.cat(outputs)
        experts_P = experts_TK.reshape(-1).cpu().numpy().astype(np.int32)
        owner_P = self._owner[layer][experts_P]
        if tokens == 1:
            rows_P = self._zeros[:k] if k <= len(self._zeros) else np.zeros(k, dtype=np.int32)
            if (owner_P == owner_P[0]).all():
                call = ExpertCall(
                    layer=layer, hidden_RH=hidden_TH, experts_P=experts_P, rows_P=rows_P, scores_E=scores_E
                )
                return self._ask_one(self._names[owner_P[0]], call, hidden_TH.device, meanwhile).view(1, k, -1)
        else:
            rows_P = np.repeat(np.arange(tokens, dtype=np.int32), k)
        order_P = np.lexsort((experts_P, owner_P))
        bounds = np.flatnonzero(np.diff(owner_P[order_P], prepend=-1, append=-1)).tolist()
        calls = {}
        for start, end in itertools.pairwise(bounds):
            mine_P = order_P[start:end]
            name = self._names[owner_P[mine_P[0]]]
            calls[name] = (mine_P, subset(layer, hidden_TH, experts_P[mine_P], rows_P[mine_P], scores_E))
        return self._ask_all(calls, len(experts_P), hidden_TH.device, meanwhile).view(tokens, k, -1)

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """Pass a forecast for a layer to come on to the local owners. Remote ones get theirs from the placement."""
        for name, mine in self.by_owner(layer, experts).items():
            if name in self._local:
                self._local[name].expect(layer, experts[mine], scores[mine])

    def _ask_one(
        self, name: DeviceName, call: ExpertCall, device: torch.device, meanwhile: Callable[[], None]
    ) -> torch.Tensor:
        worker = self._local.get(name)
        if worker is not None:
            begun = worker.begin(call)
            self._meanwhile(meanwhile, [(worker, begun, None)])
            answer = worker.finish(begun)
        else:
            assert self._remote is not None, "a device is either local or remote"
            request = self._remote.send(name, call)
            meanwhile()
            answer = self._remote.gather({request: name}, self._timeout_s)[request]
        self._account(name, answer)
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
            answers.update({requests[request]: answer for request, answer in gathered.items()})
        first = next(iter(answers.values())).output_PH
        output_PH = torch.empty((pairs, first.shape[1]), dtype=first.dtype, device=device)
        for name, answer in answers.items():
            output_PH[torch.from_numpy(calls[name][0]).to(device)] = answer.output_PH.to(device)
            self._account(name, answer)
        return output_PH

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

    def _account(self, name: DeviceName, answer: ExpertAnswer) -> None:
        self._cost += Routing(
            hits=answer.hits,
            misses=answer.misses,
            hosted=answer.hosted,
            loads=answer.loads,
            bytes_loaded=answer.bytes_loaded,
            calls=1,
        )
        if name in self._resident:
            if answer.load_s is not None:
                self._remote_load_s[name] = answer.load_s
            for identifiers, here in ((answer.evicted, False), (answer.loaded, True)):
                for identifier in identifiers:
                    layer, expert = layer_and_expert(identifier)
                    self._resident[name][layer][expert] = here
        if self._on_changes is not None and (answer.loaded or answer.evicted):
            loaded, evicted = self._changes.setdefault(name, ([], []))
            for identifier in answer.evicted:  # what came and went since the last news is none
                loaded.remove(identifier) if identifier in loaded else evicted.append(identifier)
            for identifier in answer.loaded:
                evicted.remove(identifier) if identifier in evicted else loaded.append(identifier)

    def take_cost(self) -> Routing:
        """What calls cost since the last take; also passes residency changes on."""
        cost, self._cost = self._cost, Routing()
        if self._changes and self._on_changes is not None:
            changes, self._changes = {name: pair for name, pair in self._changes.items() if any(pair)}, {}
            if changes:
                self._on_changes(changes)
        return cost


def subset(
    layer: int, hidden_TH: torch.Tensor, experts_P: np.ndarray, rows_P: np.ndarray, scores_E: np.ndarray | None
) -> ExpertCall:
    """A call with only the rows it needs, renumbered."""
    if hidden_TH.shape[0] == 1:
        return ExpertCall(layer=layer, hidden_RH=hidden_TH, experts_P=experts_P, rows_P=rows_P, scores_E=scores_E)
    needed_R, renumbered_P = np.unique(rows_P, return_inverse=True)
    hidden_RH = (
        hidden_TH if len(needed_R) == hidden_TH.shape[0] else hidden_TH[torch.from_numpy(needed_R).to(hidden_TH.device)]
    )
    return ExpertCall(
        layer=layer,
        hidden_RH=hidden_RH,
        experts_P=experts_P,
        rows_P=renumbered_P.astype(np.int32),
        scores_E=scores_E,
    )
