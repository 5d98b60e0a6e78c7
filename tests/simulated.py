"""Small settings and traces for tests of the simulation."""

from typing import Any

import numpy as np

from raymoe.simulation.setting import MainTimes, NetworkTimes, Setting, ShadowTimes, WorkerTimes
from raymoe.simulation.shape import ModelShape
from raymoe.simulation.trace import RoutingTrace
from raymoe.types import DeviceName

EXPERT_BYTES = 1000


def shape(layers: int = 8, experts: int = 8, top_k: int = 2) -> ModelShape:
    return ModelShape(
        name="toy",
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=EXPERT_BYTES,
        trunk_bytes=10 * EXPERT_BYTES,
        row_bytes=16,
        kv_bytes=64,
    )


def worker(index: int, **times: Any) -> WorkerTimes:
    return WorkerTimes(name=DeviceName(f"w{index}"), **times)


def setting(
    of: ModelShape,
    workers: int,
    *,
    main_s: float,
    worker_s: float,
    load_s: float,
    slots: int | None,
    call_s: float = 0.0,
    head_s: float = 0.0,
    shadow_s: float | None = None,
    run_ahead: int = 2,
    group_size: int | None = None,
    network: NetworkTimes | None = None,
    host_s: float | None = None,
) -> Setting:
    """All workers alike; ``worker_s`` is what one expert takes, once it is there."""
    return Setting(
        shape=of,
        workers=tuple(
            worker(index, call_s=call_s, expert_s=worker_s, load_s=load_s, slots=slots, host_s=host_s)
            for index in range(workers)
        ),
        main=MainTimes(layer_s=main_s, head_s=head_s),
        shadow=None if shadow_s is None else ShadowTimes(layer_s=shadow_s, run_ahead=run_ahead),
        network=network or NetworkTimes(),
        group_size=group_size,
    )


def trace_of(chosen: list[list[list[int]]], of: ModelShape, **more: Any) -> RoutingTrace:
    """Steps, layers, experts."""
    return RoutingTrace(shape=of, chosen_NLK=np.array(chosen, dtype=np.int32), about={}, **more)


def walking(of: ModelShape, steps: int, **more: Any) -> RoutingTrace:
    """No expert is chosen in two steps in a row, where there are enough of them."""
    start_NL1 = np.add.outer(np.arange(steps), np.arange(of.layers))[..., None] * of.top_k
    chosen_NLK = (start_NL1 + np.arange(of.top_k)) % of.experts
    return RoutingTrace(shape=of, chosen_NLK=chosen_NLK.astype(np.int32), about={}, **more)
