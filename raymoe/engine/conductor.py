"""Forecasts become load orders: who shall load what, told to the workers and booked as a plan.

The shadow's process does this for what the shadow foretells, the engine for what it foretells itself. Both decide by
the same pure rule (``placement.assignment``); the engine asks for each expert where the plan sent it, if there is one.

T tokens, K experts per token, N experts of a plan.
"""

from collections.abc import Callable, Sequence

import numpy as np

from predictor.forecast import LayerForecast
from raymoe.experts.call import LoadOrder
from raymoe.placement.assignment import Fleet, assign, in_order_of_need
from raymoe.transport.shadow import Plan
from raymoe.types import DeviceName

SendOrder = Callable[[DeviceName, LoadOrder], None]
"""Tells one worker what to load; never waits."""


class Conductor:
    """Sends load orders.

    Args:
        devices: names in the order of the fleet.
    """

    def __init__(self, fleet: Fleet, devices: Sequence[DeviceName], send: SendOrder) -> None:
        self._fleet = fleet
        self._devices = tuple(devices)
        self._send = send

    def conduct(self, forecast: LayerForecast) -> Plan:
        """Order what a forecast names; returns who was told what."""
        experts_N, workers_N = self._hand_out(forecast)
        for worker in np.unique(workers_N).tolist():
            self._order(worker, forecast, experts_N[workers_N == worker])
        return Plan(
            step=forecast.step,
            epoch=forecast.epoch,
            layer=forecast.layer,
            experts_N=experts_N,
            workers_N=workers_N.astype(np.int32),
        )

    def _hand_out(self, forecast: LayerForecast) -> tuple[np.ndarray, np.ndarray]:
        """The experts to have in slots, int32 [N], those needed most first, and the worker of each."""
        experts_N = in_order_of_need(forecast.experts_TK)
        return experts_N, assign(experts_N, forecast.layer, self._fleet)

    def _order(self, worker: int, forecast: LayerForecast, experts_N: np.ndarray) -> None:
        order = LoadOrder(step=forecast.step, epoch=forecast.epoch, layer=forecast.layer, experts=experts_N)
        self._send(self._devices[worker], order)
