"""Calls of one row for which a device computes straight from the slots, and waits for loads by itself: the host only
sees to it that what is needed is in a slot or on its way there.

Used by the engine's thread.

K experts per token.
"""

import numpy as np
import torch

from raymoe.errors import ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer
from raymoe.experts.cuda_loader import CudaLoader
from raymoe.experts.loader import Loader
from raymoe.experts.shelf import Shelf
from raymoe.experts.slots import SlotPool
from raymoe.experts.usage import Usage
from raymoe.types import DeviceName


class Staging:
    """A worker's slots, step by step.

    Attributes:
        name: of the device.

    Args:
        shelves: its slots; ``of_layer``: which of them serves each layer.
        owned: bool per expert of each layer, whether it is in the worker's shard.
        usage: counts who is asked for.
    """

    def __init__(
        self,
        name: DeviceName,
        shelves: list[Shelf],
        of_layer: list[int],
        loader: Loader,
        owned: list[np.ndarray],
        usage: Usage,
    ) -> None:
        self.name = name
        self._shelves = shelves
        self._by_layer = [shelves[number] for number in of_layer]
        self._owned = owned
        self._usage = usage
        self._loader = loader if isinstance(loader, CudaLoader) else None
        self._before = (0, 0)

    @property
    def most_experts(self) -> int:
        """Of any layer."""
        return max(len(owned) for owned in self._owned)

    @property
    def device(self) -> torch.device:
        """Where the slots lie."""
        return self._shelves[0].pool.block.device

    def pool(self, layer: int) -> SlotPool:
        """The slots that a layer's experts pass through."""
        return self._by_layer[layer].pool

    def slots_by_expert(self, layer: int) -> np.ndarray:
        """int32 per expert of the layer: its slot, -1 for those that are in none."""
        slots_E: np.ndarray = self._by_layer[layer].residency.ready_slot_LE[layer][: len(self._owned[layer])].copy()
        return slots_E

    def begin(self) -> None:
        """A step begins: the host has seen the end of all computing in slots that loads may take."""
        self._before = self._pairs()
        if self._loader is not None:
            self._loader.follows_host = True

    def stage(self, layer: int, experts_K: np.ndarray, scores_E: np.ndarray | None) -> np.ndarray:
        """The slot of each expert of one row; see ``Shelf.stage``.

        Raises ExpertUnavailableError where an expert is not in the worker's shard.
        """
        if not self._owned[layer][experts_K].all():
            raise ExpertUnavailableError(f'device "{self.name}" does not own all experts asked for in layer {layer}')
        self._usage.note(layer, experts_K)
        return self._by_layer[layer].stage(layer, experts_K, scores_E)

    def pump(self) -> None:
        """Let prefetches go on; for whoever waits for the device."""
        if self._loader is not None:
            self._loader.pump()
            for shelf in self._shelves:
                shelf.top_up()

    def end(self) -> ExpertAnswer:
        """The step has ended. What it cost, without any output."""
        if self._loader is not None:
            self._loader.follows_host = False
        hits, misses = (after - before for after, before in zip(self._pairs(), self._before, strict=True))
        changes = [shelf.take_changes() for shelf in self._shelves]
        loads = [loads for _, _, loads in changes]
        return ExpertAnswer(
            output_PH=torch.empty((0, 0)),
            hits=hits,
            misses=misses,
            loads=sum(loads),
            bytes_loaded=sum(count * shelf.expert_bytes for count, shelf in zip(loads, self._shelves, strict=True)),
            loaded=tuple(i for loaded, _, _ in changes for i in loaded),
            evicted=tuple(i for _, evicted, _ in changes for i in evicted),
            load_s=max((s for shelf in self._shelves if (s := shelf.load_cost.mean_s) is not None), default=None),
        )

    def _pairs(self) -> tuple[int, int]:
        """Hits and misses so far."""
        counters = [shelf.counters for shelf in self._shelves]
        return sum(each.hits for each in counters), sum(each.misses for each in counters)
