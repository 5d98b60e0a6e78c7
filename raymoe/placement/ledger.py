"""Books for handing out experts: who holds what, how full everybody is, and everybody's fair share.

Mutable, and used within one call of ``assign`` only.
"""

from collections.abc import Iterable, Mapping

from raymoe.types import DeviceName, ExpertKey, LayerSize


class Ledger:
    """Which workers hold which experts.

    Attributes:
        limit: host memory of each worker, in bytes.
        share: what each worker should hold, in bytes: in proportion to its memory, one copy of everything at most.
        used: what it holds.
        owners: the workers of each expert, in the order in which they got it.
    """

    def __init__(self, sizes: tuple[LayerSize, ...], limit: Mapping[DeviceName, int], replication: int) -> None:
        self.sizes = sizes
        self.replication = replication
        self.limit = dict(limit)
        self.share = fair_shares(sum(size.experts * size.expert_bytes for size in sizes), limit, replication)
        self.used = dict.fromkeys(limit, 0)
        self.held: dict[DeviceName, set[ExpertKey]] = {device: set() for device in limit}
        self.owners: dict[ExpertKey, list[DeviceName]] = {
            ExpertKey(layer=layer, expert=expert): []
            for layer, size in enumerate(sizes)
            for expert in range(size.experts)
        }

    def bytes_of(self, keys: Iterable[ExpertKey]) -> int:
        """Bytes of experts."""
        return sum(self.sizes[key.layer].expert_bytes for key in keys)

    def give(self, keys: Iterable[ExpertKey], device: DeviceName) -> None:
        """``device`` gets experts that it does not hold."""
        for key in keys:
            self.owners[key].append(device)
            self.held[device].add(key)
            self.used[device] += self.sizes[key.layer].expert_bytes

    def take(self, keys: Iterable[ExpertKey], device: DeviceName) -> None:
        """``device`` gives experts up."""
        for key in keys:
            self.owners[key].remove(device)
            self.held[device].remove(key)
            self.used[device] -= self.sizes[key.layer].expert_bytes

    def excess(self, device: DeviceName) -> float:
        """Bytes above the fair share; negative below it."""
        return self.used[device] - self.share[device]

    def room(self, device: DeviceName) -> int:
        """Bytes that still fit."""
        return self.limit[device] - self.used[device]


def fair_shares(total_bytes: int, limit: Mapping[DeviceName, int], replication: int) -> dict[DeviceName, float]:
    """Bytes that each worker should hold of ``replication`` copies of ``total_bytes``."""
    share: dict[DeviceName, float] = {}
    rest = float(replication * total_bytes)
    open_ = dict(limit)
    while open_:
        room = sum(open_.values())
        full = [device for device, bytes_ in open_.items() if rest * bytes_ >= total_bytes * room]
        if not full:
            return share | {device: rest * bytes_ / room for device, bytes_ in open_.items()}
        for device in full:
            share[device] = float(total_bytes)
            rest -= total_bytes
            del open_[device]
    return share
