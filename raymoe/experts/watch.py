"""Records what a worker does for its calls: computing, and waiting for loads. Loads themselves are the bays' to tell.

P pairs (row, expert).
"""

import numpy as np
import torch

from raymoe.experts.call import ExpertCall
from raymoe.observe.trace import Lane, Span, Tracer


class CallWatch:
    """Spans of one worker's calls. Used by the thread that computes.

    On CUDA a span ends when the device is through with its work: watched calls wait for that, others never do.
    """

    def __init__(self, tracer: Tracer, device: torch.device) -> None:
        self.tracer = tracer
        self._device = device

    def computed(self, call: ExpertCall, experts_P: np.ndarray, start_s: float, residency: str) -> None:
        """These pairs of a call were computed since ``start_s``, by ``time.perf_counter``.

        Args:
            residency: "hit", "miss" or "hosted".
        """
        experts = tuple(np.unique(experts_P).tolist())
        self._add("compute", "compute", call, experts, start_s, residency=residency, pairs=len(experts_P))

    def waited(self, call: ExpertCall, expert: int, start_s: float) -> None:
        """A call has waited since ``start_s`` for the load of one expert."""
        self._add("wait", "wait for load", call, (expert,), start_s)

    def _add(
        self, lane: Lane, kind: str, call: ExpertCall, experts: tuple[int, ...], start_s: float, **facts: str | int
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        span = Span(
            lane=lane,
            kind=kind,
            start_s=start_s,
            end_s=self.tracer.now(),
            layer=call.layer,
            experts=experts,
            step=call.step,
            facts=dict(facts),
        )
        self.tracer.add(span)
