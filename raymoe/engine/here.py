"""A layer's calls to workers of this process: they load while something else is done, and tell what is ready already.

P pairs of a layer, H hidden.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from raymoe.engine.directory import Directory
from raymoe.engine.exchange import Exchange
from raymoe.engine.workers import LocalWorker
from raymoe.experts.call import ExpertCall
from raymoe.experts.worker import Begun
from raymoe.types import DeviceName

Part = tuple[int, ExpertCall, np.ndarray | None]
"""A call: its worker, and which of all pairs are its; None is all of them in order."""


class CallsHere:
    """Used by one thread.

    Args:
        exchange: takes the answers.
    """

    def __init__(self, local: Mapping[DeviceName, LocalWorker], directory: Directory, exchange: Exchange) -> None:
        self._local = local
        self._directory = directory
        self._exchange = exchange
        self._under_way: dict[int, tuple[Begun, np.ndarray | None]] = {}

    def compute(self, parts: list[Part], meanwhile: Callable[[], None]) -> None:
        """Compute these, of which each worker begins one before it is finished.

        Args:
            meanwhile: done when they have begun to load; it may ask for a preview.
        """
        later = []
        begun = self._under_way = {}
        try:
            for worker, call, mine_P in parts:
                if worker in begun:
                    later.append((worker, call, mine_P))
                else:
                    begun[worker] = self._worker(worker).begin(call), mine_P
            meanwhile()
        finally:
            self._under_way = {}
        for worker, (each, mine_P) in begun.items():
            self._exchange.done_here(worker, each, mine_P)
        for worker, call, mine_P in later:
            self._exchange.done_here(worker, self._worker(worker).begin(call), mine_P)

    def preview(self, pairs: int) -> torch.Tensor | None:
        """See ``Dispatcher.preview``."""
        if all(begun.ready_P.all() for begun, _ in self._under_way.values()):
            return None
        hidden_RH = next(iter(self._under_way.values()))[0].call.hidden_RH
        output_PH = hidden_RH.new_zeros((pairs, hidden_RH.shape[1]))
        for worker, (begun, mine_P) in self._under_way.items():
            ready_P, ready_PH = self._worker(worker).preview(begun)
            known_P = np.flatnonzero(ready_P) if mine_P is None else mine_P[ready_P]
            output_PH[torch.from_numpy(known_P).to(output_PH.device)] = ready_PH.to(output_PH.device)
        return output_PH

    def _worker(self, worker: int) -> LocalWorker:
        return self._local[self._directory.names[worker]]
