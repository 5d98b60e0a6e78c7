"""Whom the engine asks for which expert now: what the placement says, without those that are avoided.

W workers, known by their place in ``names``; E experts of a layer, P (token, expert) pairs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from raymoe.placement.assignment import Fleet
from raymoe.placement.owners import NOBODY, owners_to_ask
from raymoe.placement.ownership import Ownership
from raymoe.transport.sockets import Endpoint
from raymoe.types import DeviceName, ExpertKey, LayerSize


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the placement says: who owns what in its host memory, whom to ask first, and where workers listen."""

    ownership: Ownership
    primary: Mapping[ExpertKey, DeviceName]
    endpoints: Mapping[DeviceName, Endpoint] = field(default_factory=dict)


class Directory:
    """Owners of experts. Used by one thread.

    Args:
        names: workers in their order, that of the fleet where there is one.
        fleet: where any owner of an expert may be asked for it by a plan; None: one is, by a table.

    Attributes:
        owner_LE: int16 [E] per layer, the worker to ask, ``NOBODY`` where there is none.
        fleet: as given, with what is owned now; who is avoided owns nothing.
        on_fleet: told of each new fleet.
        is_whole: whether there is somebody to ask for every expert.
    """

    def __init__(
        self, sizes: tuple[LayerSize, ...], view: View, names: Sequence[DeviceName], fleet: Fleet | None = None
    ) -> None:
        self.names = tuple(names)
        self.fleet = fleet
        self.on_fleet: Callable[[Fleet], None] = lambda fleet: None
        self.is_whole = True
        self.owner_LE: list[np.ndarray] = []
        self._sizes = sizes
        self._avoided: frozenset[DeviceName] = frozenset()
        self.adopt(view)

    def adopt(self, view: View) -> None:
        """Ask by this from now on. Workers that were never heard of come last."""
        known = {*self.names}
        self.names += tuple(sorted({*view.ownership, *view.primary.values()} - known))
        place = {name: worker for worker, name in enumerate(self.names)}
        self.owned_LWE = [np.zeros((len(self.names), size.experts), dtype=bool) for size in self._sizes]
        self._primary_LE = [np.full(size.experts, NOBODY, dtype=np.int16) for size in self._sizes]
        for name, keys in view.ownership.items():
            for key in keys:
                self.owned_LWE[key.layer][place[name], key.expert] = True
        for key, name in view.primary.items():
            self._primary_LE[key.layer][key.expert] = place[name]
        self._decide()

    def avoid(self, names: Collection[DeviceName]) -> None:
        """Ask none of these from now on, and all others."""
        if self._avoided != frozenset(names):
            self._avoided = frozenset(names)
            self._decide()

    def disown(self, worker: int, layer: int, experts: np.ndarray) -> None:
        """A worker says that it does not own these, whatever the placement says."""
        self.owned_LWE[layer][worker, experts] = False
        self._decide()

    def owned_by(self, worker: int) -> list[np.ndarray]:
        """Bool [E] per layer."""
        return [owned_WE[worker] for owned_WE in self.owned_LWE]

    def elsewhere(self, layer: int, experts_P: np.ndarray, but: Collection[int]) -> np.ndarray:
        """Another worker for each pair [P] than these, ``NOBODY`` where no other has its expert."""
        avoided_W = self._avoided_W()
        avoided_W[[worker for worker in but if worker >= 0]] = True
        (owner_E,) = owners_to_ask([self.owned_LWE[layer]], [self._primary_LE[layer]], avoided_W)
        return np.asarray(owner_E[experts_P])

    def silent_owners(self, layer: int, experts: np.ndarray) -> list[DeviceName]:
        """Those who own any of these, but are avoided."""
        has_W = np.atleast_1d(self.owned_LWE[layer][:, experts].any(axis=1))
        return [name for worker, name in enumerate(self.names) if has_W[worker] and name in self._avoided]

    def lost(self, layer: int) -> np.ndarray | None:
        """Bool [E]: the experts of a layer that nobody can be asked for; None where there are none."""
        if self.is_whole:
            return None
        lost_E: np.ndarray = np.asarray(self.owner_LE[layer] < 0)
        return lost_E if lost_E.any() else None

    def has(self, experts: Collection[tuple[int, int]]) -> bool:
        """Whether there is somebody to ask for all of these: (layer, expert)."""
        return all(self.owner_LE[layer][expert] >= 0 for layer, expert in experts)

    def _avoided_W(self) -> np.ndarray:
        return np.array([name in self._avoided for name in self.names], dtype=bool)

    def _decide(self) -> None:
        avoided_W = self._avoided_W()
        self.owner_LE = owners_to_ask(self.owned_LWE, self._primary_LE, avoided_W)
        self.is_whole = not any((owner_E < 0).any() for owner_E in self.owner_LE)
        if self.fleet is not None:
            owned_LWE = tuple(owned_WE[: self.fleet.workers] & ~avoided_W[:, None] for owned_WE in self.owned_LWE)
            self.fleet = replace(self.fleet, owners_LWE=owned_LWE)
            self.on_fleet(self.fleet)


def by_primary(owners: Mapping[ExpertKey, DeviceName]) -> Ownership:
    """The ownership in which each expert has one owner."""
    return {name: tuple(key for key, owner in owners.items() if owner == name) for name in sorted({*owners.values()})}


def by_fleet(fleet: Fleet, devices: Sequence[DeviceName]) -> Ownership:
    """The ownership of a fleet."""
    return {
        name: tuple(
            ExpertKey(layer=layer, expert=expert)
            for layer, owned_WE in enumerate(fleet.owners_LWE)
            for expert in np.flatnonzero(owned_WE[worker]).tolist()
        )
        for worker, name in enumerate(devices)
    }
