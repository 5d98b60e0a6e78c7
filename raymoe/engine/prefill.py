"""Prompts without a cache: a layer's experts spread over all workers, each worker's share in mini-batches.

Nearly every expert of a layer is needed, so nothing is foretold. Tokens are grouped by expert; a worker's share is cut
so that sending, loading, computing and returning overlap (OD-MoE, arXiv 2512.03927, section on prefill). How it is cut
follows from costs as measured in the calls so far.

N experts, P (token, expert) pairs, R rows, W workers.
"""

from dataclasses import dataclass, field

import numpy as np

from raymoe.experts.call import ExpertAnswer
from raymoe.placement.assignment import Fleet, spread
from raymoe.placement.minibatching import StageCosts, minibatches

SMOOTHING = 0.2  # weight of the newest measurement in a running mean
CHANGED = 1.5  # times: costs that have changed by more are worth a new search
FIRST = {"message_s": 1e-3, "byte_s": 1 / 110e6, "row_s": 5e-5, "load_s": 2e-3}  # gigabit Ethernet and a small CPU


@dataclass(slots=True)
class MeasuredCosts:
    """Running means of what one worker's calls cost: seconds per message, byte, row and expert, and load."""

    values: dict[str, float] = field(default_factory=lambda: dict(FIRST))
    _seen: set[str] = field(default_factory=set)

    def call(self, sent_bytes: int, answer: ExpertAnswer, round_trip_s: float | None) -> None:
        """A prompt's call was answered.

        Args:
            round_trip_s: of a call that waited neither for loads nor for other calls; else None.
        """
        if answer.compute_s > 0:
            self._add("row_s", answer.compute_s / answer.output_PH.shape[0])
        if answer.load_s is not None:
            self._add("load_s", answer.load_s)
        if round_trip_s is not None:
            moving_s = round_trip_s - answer.compute_s - 2 * self.values["message_s"]
            self._add("byte_s", max(0.0, moving_s) / (sent_bytes + answer.output_PH.nbytes))

    def small_call(self, on_the_way_s: float) -> None:
        """A call of few bytes and no loads took so long, but for computing."""
        self._add("message_s", on_the_way_s / 2)

    def have_changed_since(self, others: dict[str, float]) -> bool:
        """Whether anything is much more or less than it was."""
        return any(not 1 / CHANGED < (self.values[name] + 1e-9) / (others[name] + 1e-9) < CHANGED for name in others)

    def stages(self, row_bytes: int, slots: int) -> StageCosts:
        """For the decision how to cut a share."""
        return StageCosts(
            row_bytes=row_bytes,
            bytes_per_s=1 / max(self.values["byte_s"], 1e-12),
            message_s=self.values["message_s"],
            load_s=self.values["load_s"],
            row_s=self.values["row_s"],
            slots=slots,
        )

    def _add(self, name: str, value: float) -> None:
        weight = SMOOTHING if name in self._seen else 1.0  # the first measurement replaces the guess
        self._seen.add(name)
        self.values[name] += weight * (value - self.values[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """One message of a prompt's layer: a worker, its experts in the order of computing, and their pairs."""

    worker: int
    experts_N: np.ndarray
    pairs_P: np.ndarray


class PrefillPlanner:
    """Cuts prompts' layers into mini-batches.

    Args:
        whole: one message for each worker and layer, for comparison.

    Attributes:
        mean_count: mini-batches per worker and layer, a running mean.
    """

    def __init__(self, fleet: Fleet, *, whole: bool = False) -> None:
        self.costs = [MeasuredCosts() for _ in range(fleet.workers)]
        self.whole = whole
        self.mean_count = 1.0
        self._fleet = fleet
        self._counts: dict[tuple[int, ...], tuple[int, dict[str, float]]] = {}

    def use(self, fleet: Fleet) -> None:
        """Plan for these workers from now on."""
        self._fleet = fleet

    def plan(self, layer: int, experts_P: np.ndarray, rows_P: np.ndarray, row_bytes: int) -> list[MiniBatch]:
        """The mini-batches of a layer, each worker's first ones first: so all of them begin early."""
        needed_N, index_P, counts_N = np.unique(experts_P, return_inverse=True, return_counts=True)
        row_s_W = np.array([costs.values["row_s"] for costs in self.costs])
        load_s_W = np.array([costs.values["load_s"] for costs in self.costs])
        workers_N = spread(needed_N, counts_N, layer, self._fleet, row_s_W * self._unit(load_s_W))
        by_expert = np.split(np.argsort(index_P, kind="stable"), np.cumsum(counts_N)[:-1])
        queues: list[list[MiniBatch]] = []
        for worker in np.unique(workers_N).tolist():
            mine = np.flatnonzero(workers_N == worker).tolist()
            shares = [by_expert[number] for number in mine]
            queue = []
            for batch in self._cut(worker, [rows_P[pairs] for pairs in shares], row_bytes):
                experts = needed_N[[mine[place] for place in batch]]
                queue.append(
                    MiniBatch(
                        worker=worker, experts_N=experts, pairs_P=np.concatenate([shares[place] for place in batch])
                    )
                )
            queues.append(queue)
        longest = max(map(len, queues))
        self.mean_count += SMOOTHING * (sum(map(len, queues)) / len(queues) - self.mean_count)
        return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]

    def _unit(self, load_s_W: np.ndarray) -> np.ndarray:
        """Turns seconds into the fleet's own unit, in which loads are given."""
        own_W = np.array(self._fleet.loads_s)
        return own_W / np.maximum(load_s_W, 1e-9)

    def _cut(self, worker: int, rows: list[np.ndarray], row_bytes: int) -> list[list[int]]:
        """A worker's share in the order of computing, largest experts first.

        The search for the best cut takes longer than it saves in every layer; how many mini-batches are best depends
        on the size of the share alone, nearly, so that it is remembered by that.
        """
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        if self.whole:
            return [order]
        pairs, costs = sum(map(len, rows)), self.costs[worker]
        size = (worker, len(rows).bit_length(), pairs.bit_length(), row_bytes)
        count, then = self._counts.get(size, (0, {}))
        if not count or costs.have_changed_since(then):
            slots = self._fleet.slots_W[worker] if self._fleet.slots_W is not None else 2
            count = len(minibatches(rows, costs.stages(row_bytes, slots)))
            self._counts[size] = count, dict(costs.values)
        pieces: list[list[int]] = [[] for _ in range(min(count, len(rows)))]
        done = 0
        for place in order:
            pieces[min(len(pieces) - 1, done * len(pieces) // pairs)].append(place)
            done += len(rows[place])
        return [piece for piece in pieces if piece]
