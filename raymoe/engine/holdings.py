"""What workers have ready and how long their loads take, as far as this process knows.

Workers in this process are asked. Of those in others it is known by their answers, which tell what came into slots and
what left them.

E experts of a layer.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from raymoe.engine.workers import LocalWorker
from raymoe.experts.call import ExpertAnswer, layer_and_expert
from raymoe.types import DeviceName

Changes = dict[DeviceName, tuple[list[int], list[int]]]
"""Per device: ids of experts loaded and evicted."""


class Holdings:
    """Who has what ready. Used by one thread.

    Args:
        bounded: remote devices with slots; the others hold all that they own ready.
        on_changes: told of what answers say that came and went, at each ``publish``.
    """

    def __init__(
        self,
        local: Mapping[DeviceName, LocalWorker],
        bounded: Collection[DeviceName] = (),
        on_changes: Callable[[Changes], None] | None = None,
    ) -> None:
        self._local = local
        self._bounded = frozenset(bounded)
        self._on_changes = on_changes
        self._resident: dict[DeviceName, list[np.ndarray]] = {}
        self._remote_load_s: dict[DeviceName, float] = {}
        self._changes: Changes = {}

    def own(self, name: DeviceName, owned_LE: Sequence[np.ndarray]) -> None:
        """A device owns these experts (bool [E] per layer) from now on. What it holds of them it goes on holding."""
        if name in self._local:
            return
        if name not in self._bounded:
            self._resident[name] = [owned_E.copy() for owned_E in owned_LE]
            return
        held = self._resident.get(name) or [np.zeros(len(owned_E), dtype=bool) for owned_E in owned_LE]
        self._resident[name] = [held_E & owned_E for held_E, owned_E in zip(held, owned_LE, strict=True)]

    def assume(self, name: DeviceName, identifiers: Collection[int]) -> None:
        """Experts that a bounded device had in its slots before this engine asked it for anything."""
        for identifier in identifiers if name in self._bounded and name in self._resident else ():
            layer, expert = layer_and_expert(identifier)
            self._resident[name][layer][expert] = True

    def forget(self, names: Collection[DeviceName]) -> None:
        """These are other processes now, or none."""
        for name in names:
            self._resident.pop(name, None)
            self._remote_load_s.pop(name, None)

    def ready(self, name: DeviceName, layer: int) -> np.ndarray:
        """Bool [E]: what a device has ready. Not to be changed."""
        worker = self._local.get(name)
        return worker.ready(layer) if worker is not None else self._resident[name][layer]

    def load_s(self, name: DeviceName) -> float | None:
        """Seconds to load one expert on a device, as measured lately; None where that is not known."""
        worker = self._local.get(name)
        return worker.load_s if worker is not None else self._remote_load_s.get(name)

    def slowest_load_s(self) -> float | None:
        """The same of the slowest device; None where none is known."""
        local = (seconds for worker in self._local.values() if (seconds := worker.load_s) is not None)
        return max((*local, *self._remote_load_s.values()), default=None)

    def note(self, name: DeviceName, answer: ExpertAnswer) -> None:
        """Take in what a worker's answer says."""
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

    def publish(self) -> None:
        """Pass on what has changed since the last time."""
        if self._changes and self._on_changes is not None:
            changes, self._changes = {name: pair for name, pair in self._changes.items() if any(pair)}, {}
            if changes:
                self._on_changes(changes)
