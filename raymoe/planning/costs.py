"""What each part of a step takes on a planned cluster: from operations, bytes and messages, or as measured. Pure.

A product with weights that are read once takes the longer of reading them and of computing with them; software comes on
top for each layer of the trunk and of the shadow. A layer's call costs a round trip, and its rows pass the trunk's own
port one after the other, whoever computes them.

T rows that are computed together (1 in plain decoding), W workers.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import numpy as np

from raymoe.placement.assignment import Fleet, assign
from raymoe.placement.grouping import worker_groups
from raymoe.planning.cluster import Device
from raymoe.planning.facts import ModelFacts
from raymoe.planning.layout import Cluster, shares

DECIDING = 0.57  # of a layer's software: 0.8 ms beside 1.4 ms, docs/benchmarks.md, "importance" and "decode"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A model on a cluster, as times. Parts can be scaled, to see what each is worth.

    Attributes:
        scales: factors on "trunk", "experts", "network", "link", "shadow" and "software".
    """

    facts: ModelFacts
    cluster: Cluster
    scales: tuple[tuple[str, float], ...] = ()

    def scale(self, part: str) -> float:
        """The factor on a part's time."""
        return dict(self.scales).get(part, 1.0)

    # --- the trunk -------------------------------------------------------------------------------------

    def main_s(self, rows: int = 1) -> float:
        """The trunk's share of one MoE layer, for ``rows`` rows."""
        device = self.cluster.trunk
        computed_s = self.scale("trunk") * self._product_s(device, self.facts.layer_bytes, rows)
        if device.times.main_layer_s is not None:
            alone_s = self._product_s(device, self.facts.layer_bytes, 1)
            return self.scale("trunk") * device.times.main_layer_s + max(0.0, computed_s - alone_s)
        return computed_s + self.scale("software") * device.overhead_s

    def head_s(self, rows: int = 1) -> float:
        """The trunk outside of its layers: the output matrix, and choosing a token."""
        device = self.cluster.trunk
        if device.times.head_s is not None:
            return device.times.head_s
        computed_s = self._product_s(device, self.facts.head_bytes, rows)
        return self.scale("trunk") * computed_s + self.scale("software") * device.overhead_s

    @property
    def deciding_s(self) -> float:
        """What substitution and forecasts cost per layer."""
        return self.scale("software") * DECIDING * self.cluster.trunk.overhead_s

    def _product_s(self, device: Device, nbytes: float, rows: int) -> float:
        """Seconds for ``rows`` rows times weights of so many bytes."""
        operations = 2.0 * nbytes / self.facts.element_bytes * rows
        return max(nbytes / device.memory_bytes_per_s, operations / device.flops)

    # --- workers ---------------------------------------------------------------------------------------

    def expert_s(self, rows: float = 1.0) -> float:
        """Computing one expert for ``rows`` rows, on the worker of a mean expert."""
        times_W = np.array([self._expert_s(worker, rows) for worker in self.cluster.workers])
        return self.scale("experts") * float(self._shares_W @ times_W)

    def _expert_s(self, worker: Device, rows: float) -> float:
        at_once = max(1, round(rows))
        computed_s = self._product_s(worker, self.facts.expert_bytes, at_once)
        if worker.times.expert_s is None:
            return computed_s
        return worker.times.expert_s + max(0.0, computed_s - self._product_s(worker, self.facts.expert_bytes, 1))

    def call_s(self, workers: int, rows: int = 1) -> float:
        """Messages of one layer: a round trip, ``rows`` rows to each of ``workers``, an answer for each pair."""
        messages_s = self._messages_s(workers, rows)
        measured = [worker.times.layer_s for worker in self.cluster.workers if worker.times.layer_s is not None]
        if measured:
            computed_s = ceil(self.facts.top_k / workers) * self.expert_s() / self.scale("experts")
            messages_s += max(0.0, max(measured) - computed_s) - self._messages_s(workers, 1)
        return self.scale("network") * messages_s

    def _messages_s(self, workers: int, rows: int) -> float:
        cluster = self.cluster
        remote = sum(worker.name != cluster.trunk_name for worker in cluster.workers) / len(cluster.workers)
        if not remote:
            return 0.0
        sent = rows * (workers + self.facts.top_k) * self.facts.row_bytes * remote
        return 2 * cluster.network.latency_s + sent / cluster.network.bytes_per_s

    def load_s(self) -> float:
        """Loading one expert, on the worker of a mean expert."""
        return self.scale("link") * float(self._shares_W @ np.array(self._loads_s))

    @cached_property
    def _shares_W(self) -> np.ndarray:
        return shares(self.facts, self.cluster)

    @cached_property
    def _loads_s(self) -> tuple[float, ...]:
        return tuple(worker.load_s(self.facts.expert_bytes) for worker in self.cluster.workers)

    def host_s(self) -> float | None:
        """Computing one expert on the host beside a device; None where that was not measured."""
        times = [worker.times.host_expert_s for worker in self.cluster.workers]
        known = [time_s for time_s in times if time_s is not None]
        return max(known) if len(known) == len(times) else None

    def group_loads(self, group_size: int, experts: int) -> tuple[int, float]:
        """Loads of a layer's ``experts`` experts by a group: most of one worker, and seconds until the last is done.

        Handed out as the running cluster does it; the slowest group counts.
        """
        groups = worker_groups(len(self._loads_s), group_size)
        alike = {tuple(sorted(self._loads_s[worker] for worker in group)) for group in groups}
        found = [handed_out(loads_s, experts) for loads_s in alike]
        return max(most for most, _ in found), self.scale("link") * max(last_s for _, last_s in found)

    def link_bytes_per_s(self) -> float:
        """All workers' links together; infinite where nothing is loaded."""
        if not all(self._loads_s):
            return float("inf")
        return sum(self.facts.expert_bytes / (load_s * self.scale("link")) for load_s in self._loads_s)

    # --- the shadow ------------------------------------------------------------------------------------

    def shadow_s(self) -> float | None:
        """The shadow's time per MoE layer; None without one."""
        device, facts, bits = self.cluster.shadow, self.facts, self.cluster.predictor.bits
        if device is None:
            return None
        if device.times.shadow_layer_s is not None:
            return self.scale("shadow") * device.times.shadow_layer_s
        trunk = facts.layer_bytes / facts.element_bytes * facts.shadow_trunk_element_bytes(bits)
        nbytes = trunk + facts.top_k * facts.shadow_expert_bytes(bits)
        computed_s = nbytes / device.memory_bytes_per_s
        # where it has a device of its own, its software is no part of the trunk's
        return self.scale("shadow") * (computed_s + device.overhead_s)


@lru_cache(maxsize=4096)
def handed_out(loads_s: tuple[float, ...], experts: int) -> tuple[int, float]:
    """Of one group that owns everything: loads of the worker that gets most, and when the last is done."""
    workers = len(loads_s)
    load_s_W = np.maximum(np.array(loads_s), 1e-9)  # of unified devices, which load nothing
    owners_WE = np.ones((workers, experts), dtype=bool)
    fleet = Fleet(workers=workers, group_size=workers, owners_LWE=(owners_WE,), load_s_W=load_s_W)
    counts_W = np.bincount(assign(np.arange(experts), 0, fleet), minlength=workers)
    return int(counts_W.max()), float((counts_W * np.array(loads_s)).max())
