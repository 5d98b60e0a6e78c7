"""One layer's experts, wherever they are: split by owner, send, gather, put back in order.

No remote call decides anything here: the owners' table is in this process, one message goes to each worker
involved, and nothing is created per expert. A ``local`` worker costs a function call.

T tokens, K experts per token, P = T * K pairs, H hidden.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch

from raymoe.errors import ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, ExpertCall
from raymoe.types import DeviceName, ExpertKey, LayerSize, Routing


class LocalWorker(Protocol):
    """A worker in this process."""

    def compute(self, call: ExpertCall) -> ExpertAnswer:
        """Compute a call now."""
        ...


class RemoteWorkers(Protocol):
    """Workers in other processes."""

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        """Send a call; returns its request number."""
        ...

    def gather(self, requests: dict[int, DeviceName], timeout_s: float) -> dict[int, ExpertAnswer]:
        """Wait for answers."""
        ...


Changes = dict[DeviceName, tuple[list[int], list[int]]]
"""Per device: ids of experts loaded and evicted."""


class Dispatcher:
    """The engine's ``ExpertBackend``. Used by one thread.

    Args:
        owners: whom to ask for each expert.
        max_rows: tokens per message; longer prompts go in several, so that messages stay bounded.
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
    ) -> None:
        self._local = local
        self._remote = remote
        self._timeout_s = timeout_s
        self._max_rows = max_rows
        self._on_changes = on_changes
        self._zeros = np.zeros(max(size.top_k for size in sizes), dtype=np.int32)
        self._cost = Routing()
        self._changes: Changes = {}
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

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every chosen expert, [T, K, H], on the device of ``hidden_TH``."""
        tokens, k = experts_TK.shape
        if tokens > self._max_rows:
            parts = zip(hidden_TH.split(self._max_rows), experts_TK.split(self._max_rows), strict=True)
            return torch.cat([self.compute(layer, hidden, experts) for hidden, experts in parts])
        experts_P = experts_TK.reshape(-1).cpu().numpy().astype(np.int32)
        owner_P = self._owner[layer][experts_P]
        if tokens == 1:
            rows_P = self._zeros[:k] if k <= len(self._zeros) else np.zeros(k, dtype=np.int32)
            if (owner_P == owner_P[0]).all():
                call = ExpertCall(layer=layer, hidden_RH=hidden_TH, experts_P=experts_P, rows_P=rows_P)
                return self._ask_one(self._names[owner_P[0]], call, hidden_TH.device).view(1, k, -1)
        else:
            rows_P = np.repeat(np.arange(tokens, dtype=np.int32), k)
        order_P = np.lexsort((experts_P, owner_P))
        bounds = np.flatnonzero(np.diff(owner_P[order_P], prepend=-1, append=-1)).tolist()
        calls = {}
        for start, end in itertools.pairwise(bounds):
            mine_P = order_P[start:end]
            name = self._names[owner_P[mine_P[0]]]
            calls[name] = (mine_P, subset(layer, hidden_TH, experts_P[mine_P], rows_P[mine_P]))
        return self._ask_all(calls, len(experts_P), hidden_TH.device).view(tokens, k, -1)

    def _ask_one(self, name: DeviceName, call: ExpertCall, device: torch.device) -> torch.Tensor:
        worker = self._local.get(name)
        if worker is not None:
            answer = worker.compute(call)
        else:
            assert self._remote is not None, "a device is either local or remote"
            request = self._remote.send(name, call)
            answer = self._remote.gather({request: name}, self._timeout_s)[request]
        self._account(name, answer)
        return answer.output_PH.to(device)

    def _ask_all(
        self, calls: dict[DeviceName, tuple[np.ndarray, ExpertCall]], pairs: int, device: torch.device
    ) -> torch.Tensor:
        """Send to remote workers first, compute local ones meanwhile, then gather."""
        requests: dict[int, DeviceName] = {}
        for name, (_, call) in calls.items():
            if name not in self._local:
                assert self._remote is not None, "a device is either local or remote"
                requests[self._remote.send(name, call)] = name
        answers = {name: self._local[name].compute(call) for name, (_, call) in calls.items() if name in self._local}
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

    def _account(self, name: DeviceName, answer: ExpertAnswer) -> None:
        self._cost += Routing(
            hits=answer.hits,
            misses=answer.misses,
            loads=answer.loads,
            bytes_loaded=answer.bytes_loaded,
            calls=1,
        )
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


def subset(layer: int, hidden_TH: torch.Tensor, experts_P: np.ndarray, rows_P: np.ndarray) -> ExpertCall:
    """A call with only the rows it needs, renumbered."""
    if hidden_TH.shape[0] == 1:
        return ExpertCall(layer=layer, hidden_RH=hidden_TH, experts_P=experts_P, rows_P=rows_P)
    needed_R, renumbered_P = np.unique(rows_P, return_inverse=True)
    hidden_RH = (
        hidden_TH if len(needed_R) == hidden_TH.shape[0] else hidden_TH[torch.from_numpy(needed_R).to(hidden_TH.device)]
    )
    return ExpertCall(layer=layer, hidden_RH=hidden_RH, experts_P=experts_P, rows_P=renumbered_P.astype(np.int32))
