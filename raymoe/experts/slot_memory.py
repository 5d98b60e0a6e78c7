"""Slots on a device that has less memory than its budget says: as many as fit, or an error that says how many would."""

import logging
from collections.abc import Callable

import torch

from raymoe.errors import CapacityError
from raymoe.experts.slots import SlotPool

log = logging.getLogger(__name__)

USED_SHARE = 0.9  # of the memory that is free; the rest is for activations, and for what allocators round up


class DeviceMemory:
    """Memory of a device, for slots."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As ``torch.empty``. Raises torch.OutOfMemoryError where there is not enough."""
        return torch.empty(shape, dtype=dtype, device=device)

    def free_bytes(self) -> int:
        """Left on the device, once what nobody uses was given back."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])


def allocate_slots(
    name: str,
    counts: list[int],
    sizes: list[int],
    least: list[int],
    new_pool: Callable[[int, int], SlotPool],
    share: Callable[[int], list[int]],
    memory: DeviceMemory,
) -> list[SlotPool]:
    """A pool of each kind, with so many slots; or fewer where the device's memory does not last, in a second attempt.

    Args:
        counts, sizes: slots of each kind, and bytes of each.
        least: experts of each kind that a token needs in one layer; fewer slots than that are refused.
        new_pool: makes a pool of a kind with so many slots.
        share: slots of each kind within so many bytes.

    Raises CapacityError where not even that works.
    """
    try:
        return [new_pool(kind, count) for kind, count in enumerate(counts)]
    except torch.OutOfMemoryError:
        pass  # and not within: the error holds on to what was allocated before it
    wanted_bytes = sum(count * size for count, size in zip(counts, sizes, strict=True))
    free_bytes = memory.free_bytes()
    fewer = share(int(USED_SHARE * min(free_bytes, wanted_bytes)))
    shortage = (
        f'device "{name}" has no memory for {sum(counts)} slots ({wanted_bytes:,} bytes): {free_bytes:,} bytes are free'
    )
    way_out = "lower devices[].slot_memory, or free memory on the device"
    if any(count < min(need, before) for count, need, before in zip(fewer, least, counts, strict=True)):
        raise CapacityError(f"{shortage}, too few for the experts of one token; {way_out}")
    try:
        pools = [new_pool(kind, count) for kind, count in enumerate(fewer)]
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"{shortage}, and not even {sum(fewer)} slots could be allocated; {way_out}") from error
    log.warning("%s; it goes on with %d", shortage, sum(fewer))
    return pools
