"""Prefetch orders that wait for the link: pulled one by one when it is free, gone when their layer has come."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Orders:
    """Experts by id with what each would be worth; no slot is taken and nothing is evicted for them yet."""

    by_layer: dict[int, dict[int, float]] = field(default_factory=dict)

    def place(self, layer: int, worth: dict[int, float]) -> None:
        """Order experts of a layer, in place of what was ordered for it before."""
        if worth:
            self.by_layer[layer] = worth
        else:
            self.by_layer.pop(layer, None)

    def drop(self, layer: int) -> int:
        """The layer has come, its orders are late: forget them. Returns how many there were."""
        return len(self.by_layer.pop(layer, ()))

    def cancel(self, identifier: int) -> None:
        """Forget the order for one expert, if there is any."""
        for layer in [layer for layer, orders in self.by_layer.items() if identifier in orders]:
            self.place(layer, {i: worth for i, worth in self.by_layer[layer].items() if i != identifier})

    def take(self) -> tuple[int, float] | None:
        """The order that is worth most, or None. Ties go to the lower id. Removes it."""
        best = None
        for layer, orders in self.by_layer.items():
            for identifier, worth in orders.items():
                if best is None or (-worth, identifier) < best[:2]:
                    best = (-worth, identifier, layer)
        if best is None:
            return None
        worth, identifier, layer = -best[0], best[1], best[2]
        del self.by_layer[layer][identifier]
        if not self.by_layer[layer]:
            del self.by_layer[layer]
        return identifier, worth

    def __len__(self) -> int:
        return sum(map(len, self.by_layer.values()))
