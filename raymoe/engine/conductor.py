"""Forecasts become load orders: who shall load what, told to the workers and booked as a plan.

The shadow's process does this for what the shadow foretells, the engine for what it foretells itself. Both decide by
the same pure rule (``placement.assignment``); the engine asks for each expert where the plan sent it, if there is one.

T tokens, K experts per token, N experts of a plan.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from predictor.forecast import LayerForecast
from raymoe.experts.call import LoadOrder
from raymoe.placement.assignment import Fleet, assign, in_order_of_need, reassign
from raymoe.transport.shadow_messages import Plan
from raymoe.types import DeviceName, StepId

MOST_REMEMBERED = 4096  # layers of sequences; forgetting one makes an expert loaded twice, no more

SendOrder = Callable[[DeviceName, LoadOrder], None]
"""Tells one worker what to load; never waits."""


@dataclass(frozen=True, slots=True)
class _Ordered:
    """What was ordered for a layer of one step: the worker of each expert."""

    step: StepId
    epoch: int
    workers: dict[int, int] = field(default_factory=dict)


class Conductor:
    """Sends load orders.

    Several forecasts for one layer of a step add up: a pass of several positions is foretold one by one. Each expert is
    ordered once.

    Args:
        devices: names in the order of the fleet.
    """

    def __init__(self, fleet: Fleet, devices: Sequence[DeviceName], send: SendOrder) -> None:
        self._fleet = fleet
        self._devices = tuple(devices)
        self._send = send
        self._ordered: OrderedDict[tuple[int, int], _Ordered] = OrderedDict()  # by sequence and layer

    def use(self, fleet: Fleet) -> None:
        """Conduct these workers from now on. What was ordered of one who does not own it any more was not ordered."""
        self._fleet = fleet
        for (_, layer), ordered in self._ordered.items():
            owned_WE = fleet.owners_LWE[layer]
            for expert in [expert for expert, worker in ordered.workers.items() if not owned_WE[worker, expert]]:
                del ordered.workers[expert]

    def conduct(self, forecast: LayerForecast) -> Plan:
        """Order what a forecast names and none before it did for this layer; returns who was told what, now or then.

        An expert that nobody owns now is left out.
        """
        experts_N = in_order_of_need(forecast.experts_TK)
        experts_N = experts_N[self._fleet.owned(forecast.layer, experts_N)]
        before = self._before(forecast)
        workers_N = self._hand_out(experts_N, forecast.layer, before.workers)
        self._send_orders(forecast, experts_N, workers_N, before)
        return plan_of(forecast, experts_N, workers_N)

    def _send_orders(
        self, forecast: LayerForecast, experts_N: np.ndarray, workers_N: np.ndarray, before: _Ordered
    ) -> list[int]:
        """Order what was not ordered before, which is noted; returns the workers that were told something."""
        fresh_N = np.array([expert not in before.workers for expert in experts_N.tolist()], dtype=bool)
        before.workers.update(zip(experts_N.tolist(), workers_N.tolist(), strict=True))
        told: list[int] = np.unique(workers_N[fresh_N]).tolist()
        for worker in told:
            self._order(worker, forecast, experts_N[fresh_N & (workers_N == worker)])
        return told

    def _before(self, forecast: LayerForecast) -> _Ordered:
        """What was ordered for the forecast's layer of its step, in its epoch."""
        key = forecast.step.sequence, forecast.layer
        ordered = self._ordered.pop(key, None)
        if ordered is None or (ordered.step, ordered.epoch) != (forecast.step, forecast.epoch):
            ordered = _Ordered(forecast.step, forecast.epoch)
        self._ordered[key] = ordered
        if len(self._ordered) > MOST_REMEMBERED:
            self._ordered.popitem(last=False)
        return ordered

    def _hand_out(self, experts_N: np.ndarray, layer: int, before: dict[int, int]) -> np.ndarray:
        """A worker for each expert [N]; those that were ordered stay where they are, and count as loads there."""
        if not before:
            return assign(experts_N, layer, self._fleet)
        ordered_N = np.array(list(before), dtype=experts_N.dtype)
        union_N = np.concatenate([experts_N, ordered_N[~np.isin(ordered_N, experts_N)]])
        return reassign(union_N, before, layer, self._fleet)[: len(experts_N)]

    def _order(self, worker: int, forecast: LayerForecast, experts_N: np.ndarray) -> None:
        order = LoadOrder(step=forecast.step, epoch=forecast.epoch, layer=forecast.layer, experts=experts_N)
        self._send(self._devices[worker], order)


def plan_of(forecast: LayerForecast, experts_N: np.ndarray, workers_N: np.ndarray) -> Plan:
    """Who was told to load what for a forecast."""
    return Plan(
        step=forecast.step,
        epoch=forecast.epoch,
        layer=forecast.layer,
        experts_N=experts_N,
        workers_N=workers_N.astype(np.int32),
    )
