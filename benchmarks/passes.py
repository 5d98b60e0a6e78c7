"""``python -m benchmarks.passes``: what a pass of 1 to 9 positions takes, with every expert resident in one process.

That is what drafts cost in computing alone: the trunk, and the experts of all positions. Loads come on top of it where
there is no cache; how many distinct experts a pass needs is counted here. The text is real, the model the embedded one
in float32, one thread. Lengths are measured in turns. Nothing is loaded, so the roofline is the memory's: the trunk and
those experts, read once by one thread (``roofline_fraction``).
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.harness import Figure, arguments, figure, in_turns, ratios, read_bandwidth, report
from benchmarks.roofline import MEMORY_FLOOR, active_bytes, floor_s
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.experts.build import make_worker
from raymoe.model.runner import SequenceState
from raymoe.model.trials import make_cuttable
from raymoe.placement.drafting import best_drafts, fitted
from raymoe.types import DeviceName, ExpertKey

POSITIONS = (1, 2, 3, 4, 5, 9)
PASSES = 16  # of each length, from the same place of the text in every round
PREFIX = 64
ROUNDS, QUICK_ROUNDS = 15, 5
ACCEPTANCES = (0.5, 0.7, 0.9, 0.97)
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; " * 8


def resident_service() -> tuple[ModelService, Callable[[], None]]:
    """The embedded model with all experts in this process, and what closes it."""
    config = ClusterConfig.parse(
        {"model": {"dtype": "float32"}, "devices": [{"name": "here", "transport": "local"}], "trunk": {"threads": 1}}
    )
    checkpoint = open_checkpoint(EMBEDDED_MODEL, "float32")
    sizes, name = checkpoint.sizes(), DeviceName("here")
    keys = [ExpertKey(layer=i, expert=e) for i, size in enumerate(sizes) for e in range(size.experts)]
    worker = make_worker(checkpoint, config.devices[0], config.scheduling)
    worker.own(keys)
    dispatcher = Dispatcher(sizes, dict.fromkeys(keys, name), local={name: worker}, remote=None, timeout_s=60.0)
    service = ModelService(checkpoint, config, dispatcher)

    def close() -> None:
        service.close()
        worker.close()

    return service, close


class Reading:
    """Reads a text in passes of one length, again and again."""

    def __init__(self, service: ModelService, text: list[int]) -> None:
        self._runner = service.runner
        self._text = text

    def pass_s(self, positions: int) -> float:
        """Median seconds of a pass."""
        _, state = self._runner.prefill(self._text[:PREFIX])
        assert make_cuttable(state) is None, "the embedded model's cache can be cut"
        return statistics.median(self._one(state, positions, turn) for turn in range(PASSES))

    def _one(self, state: SequenceState, positions: int, turn: int) -> float:
        """One pass, of which the first position is kept: the rest is read again, as after a wrong guess."""
        start = PREFIX + turn
        start_s = time.perf_counter()
        trial = self._runner.read(state, self._text[start : start + positions])
        took_s = time.perf_counter() - start_s
        self._runner.keep(state, trial, 1)
        return took_s


class Counting:
    """Counts the distinct experts of each pass, layer by layer, beside the scheduler."""

    def __init__(self, service: ModelService) -> None:
        self.counts: dict[int, list[int]] = {}
        compute = service.experts.compute

        def count(layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
            self.counts.setdefault(len(experts_TK), []).append(len(np.unique(experts_TK.numpy())))
            return compute(layer, hidden_TH, experts_TK)

        service.experts.compute = count  # type: ignore[method-assign]


def main() -> None:
    """Measure, print, write."""
    options = arguments("what passes of several positions take")
    torch.set_num_threads(1)
    service, close = resident_service()
    try:
        text = service.encode(TEXT)[: PREFIX + PASSES + max(POSITIONS)]
        reading = Reading(service, text)
        variants = {str(n): partial(reading.pass_s, n) for n in POSITIONS}
        measured = in_turns(variants, QUICK_ROUNDS if options.quick else ROUNDS)
        counting = Counting(service)
        for positions in POSITIONS:
            reading.pass_s(positions)
    finally:
        close()
    bandwidth = read_bandwidth(1)
    figures = [figure(f"pass_{n}", [1000 * value for value in measured[str(n)]], "ms") for n in POSITIONS]
    figures += [figure(f"pass_{n}_vs_1", ratios(measured[str(n)], measured["1"]), "x") for n in POSITIONS[1:]]
    distinct = {n: statistics.mean(counting.counts[n]) for n in POSITIONS}
    figures += [figure(f"experts_{n}", [distinct[n]], "per layer") for n in POSITIONS]
    for n in POSITIONS:
        floor = floor_s(resident_s=active_bytes(service.checkpoint, distinct[n]) / bandwidth)
        figures.append(
            figure(f"roofline_fraction_{n}", [floor / value for value in measured[str(n)]], "", MEMORY_FLOOR)
        )
    figures += depths({n: statistics.median(measured[str(n)]) for n in POSITIONS}, distinct)
    report("passes of several positions, everything resident, one thread", figures, {"rounds": ROUNDS}, options.json)


def depths(seconds: dict[int, float], distinct: dict[int, float]) -> list[Figure]:
    """The number of drafts that pays by acceptance: where nothing is loaded, and where loads are all that counts."""
    compute, loads = fitted(seconds), fitted(distinct)
    found = []
    for acceptance in ACCEPTANCES:
        resident = best_drafts(acceptance, compute, loads.times(0.0), 8)
        loading = best_drafts(acceptance, compute, loads.times(1.0), 8)  # a second per load: nothing else counts
        found.append(figure(f"drafts_at_{acceptance:g}", [resident], "resident", note=f"{loading} where links decide"))
    return found


if __name__ == "__main__":
    main()
