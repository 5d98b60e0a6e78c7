"""The slots of a worker, cut from its budget: one bay for each shape that its experts have."""

from collections.abc import Callable, Sequence

import torch

from raymoe.checkpoint.checkpoint import MoeLayer
from raymoe.errors import CapacityError
from raymoe.experts.bay import Bay
from raymoe.experts.conveyor import Conveyor
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import Loader
from raymoe.experts.shelf import Shelf
from raymoe.experts.slot_memory import DeviceMemory, allocate_slots
from raymoe.experts.slots import Residency, SlotPool
from raymoe.placement.keeping import Keeper
from raymoe.types import ExpertKey

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def make_bays(
    *,
    name: str,
    layers: Sequence[MoeLayer],
    keys: Sequence[ExpertKey],
    budget_bytes: int | None,
    dtype: torch.dtype,
    device: torch.device,
    loader: Loader,
    store: HostStore,
    new_keeper: Callable[[], Keeper] | None,
    on_orders: bool = False,
    memory: DeviceMemory | None = None,
) -> tuple[list[Bay], list[int]]:
    """All bays, and which of them serves each layer.

    Args:
        keys: the experts that the worker owns.
        new_keeper: judges what slots keep; None keeps nothing.
        on_orders: whether slots are given to orders for steps to come, and kept only while nobody ordered needs them.
        memory: where slots are allocated; omitted: on the device.

    Raises CapacityError where the budget, or the device, does not hold one expert of each shape.
    """
    signatures: list[Shapes] = [tuple(sorted(layer.shapes.items())) for layer in layers]
    kinds = list(dict.fromkeys(signatures))
    kind_of_layer = [kinds.index(signature) for signature in signatures]
    counts = [sum(kind_of_layer[key.layer] == kind for key in keys) for kind in range(len(kinds))]
    sizes = [sum(torch.Size(shape).numel() for _, shape in kind) * dtype.itemsize for kind in kinds]
    experts = max(layer.num_experts for layer in layers)
    slots = share_slots(name, budget_bytes, sizes, counts)
    least = [
        max(layer.top_k for layer, kind in zip(layers, kind_of_layer, strict=True) if kind == each)
        for each in range(len(kinds))
    ]
    memory = memory or DeviceMemory(device)
    pools = allocate_slots(
        name,
        slots,
        sizes,
        least,
        lambda kind, count: SlotPool(dict(kinds[kind]), count, dtype, device, memory.allocate),
        lambda budget: share_slots(name, budget, sizes, slots),
        memory,
    )
    bays: list[Bay] = []
    for kind, (size, pool) in enumerate(zip(sizes, pools, strict=True)):
        sharing = len({key.layer for key in keys if kind_of_layer[key.layer] == kind})
        residency = Residency(pool.count, len(layers), experts, max(1, sharing))
        keeper = new_keeper() if new_keeper is not None else None
        if on_orders or keeper is None:
            bays.append(Conveyor(pool, residency, loader, store, size, keeper))
        else:
            bays.append(Shelf(pool, residency, loader, store, size, keeper))
        bays[-1].shrunk = slots[kind] - pool.count
    return bays, kind_of_layer


def share_slots(name: str, budget_bytes: int | None, sizes: list[int], owned: list[int]) -> list[int]:
    """How many slots of each shape a budget gives: at least one per shape in use, never more than experts owned.

    Args:
        sizes: bytes of one expert of each shape.
        owned: experts of each shape in the shard.

    Raises CapacityError where the budget does not hold one expert of each.
    """
    if budget_bytes is None:
        return list(owned)
    least = sum(size for size, count in zip(sizes, owned, strict=True) if count)
    if budget_bytes < least:
        raise CapacityError(
            f'device "{name}": slot_memory of {budget_bytes:,} bytes is less than one expert ({least:,} bytes); '
            f"raise it to at least {least:,}"
        )
    total = sum(size * count for size, count in zip(sizes, owned, strict=True))
    counts = [max(1, count * min(budget_bytes, total) // total) if count else 0 for count in owned]
    while sum(size * count for size, count in zip(sizes, counts, strict=True)) > budget_bytes:
        largest = max(range(len(counts)), key=lambda i: (counts[i] > 1, sizes[i] * counts[i]))
        counts[largest] -= 1
    return counts
