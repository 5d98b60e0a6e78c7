"""Time to first token: a prompt through all layers, by the rules that the engine cuts prompts by.

No events: mini-batches follow each other by the stages of ``placement.minibatching``, layers wait for each other.

R rows of a prompt, K experts per token, N distinct experts.
"""

import numpy as np

from raymoe.placement.assignment import Fleet, spread
from raymoe.placement.minibatching import StageCosts, minibatches, pipeline_s
from raymoe.simulation.setting import Setting, WorkerTimes
from raymoe.simulation.trace import RoutingTrace
from raymoe.types import DeviceName, ExpertKey


def first_token_s(
    trace: RoutingTrace,
    setting: Setting,
    tokens: int,
    *,
    fleet: Fleet | None = None,
    primary: dict[ExpertKey, DeviceName] | None = None,
    resident: bool = False,
) -> float:
    """Seconds until the first token of a prompt of ``tokens``, whose routing is that of the trace's first steps.

    Args:
        fleet: without a cache: a layer's experts are spread over all who own them, in mini-batches.
        primary: with one: each expert's owner, which gets one message per layer.
        resident: nothing has to be loaded.
    """
    assert (fleet is None) != (primary is None), "experts are handed out in one way"
    rows = np.arange(tokens) % trace.steps
    place = {name: worker for worker, name in enumerate(setting.names)}
    main = setting.main
    total_s = main.head_s
    for layer in range(trace.shape.layers):
        chosen_RK = trace.chosen_NLK[rows, layer]
        needed_N, counts_N = np.unique(chosen_RK, return_counts=True)
        if fleet is not None:
            row_s_W = np.array([worker.row_s for worker in setting.workers])
            owners_N = spread(needed_N, counts_N, layer, fleet, row_s_W).tolist()
        else:
            assert primary is not None
            owners_N = [place[primary[ExpertKey(layer=layer, expert=int(expert))]] for expert in needed_N]
        slowest_s = 0.0
        for worker in sorted(set(owners_N)):
            mine = [int(expert) for expert, owner in zip(needed_N, owners_N, strict=True) if owner == worker]
            shares = [np.flatnonzero((chosen_RK == expert).any(axis=1)) for expert in mine]
            mean = max(1, round(sum(map(len, shares)) / len(shares)))
            costs = _costs(setting, setting.workers[worker], mean, resident=resident)
            batches = minibatches(shares, costs) if fleet is not None else (tuple(range(len(mine))),)
            slowest_s = max(slowest_s, setting.workers[worker].call_s + pipeline_s(batches, shares, costs))
        total_s += main.layer_s + (tokens - 1) * main.row_s + slowest_s
    return total_s


def _costs(setting: Setting, worker: WorkerTimes, rows: int, *, resident: bool) -> StageCosts:
    """The stages' costs for experts of about so many rows: an expert's weights are read once, however many it has."""
    is_loaded = worker.slots is not None and not resident
    return StageCosts(
        row_bytes=setting.shape.row_bytes,
        bytes_per_s=float("inf") if worker.is_local else setting.network.bytes_per_s,
        message_s=0.0 if worker.is_local else setting.network.latency_s,
        load_s=worker.load_s if is_loaded else 0.0,
        row_s=worker.compute_s(rows) / rows,
        slots=worker.slots if is_loaded and worker.slots is not None else setting.shape.experts,
    )
