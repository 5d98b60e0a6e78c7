"""Which expert is to blame for logits that are no numbers: the request's tokens are read again, and all outputs seen.

Nothing of this is on the way of a request that is well: the sampler finds that its choice is no number, and only then
is the model run again, one forward over all tokens of the one request.

T tokens, K experts per token, H hidden.
"""

import logging
import math
from collections.abc import Callable

import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.engine.sampling import NOT_FINITE
from raymoe.engine.sequence import Sequence
from raymoe.engine.totals import Totals
from raymoe.errors import ExpertOutputError, NotFiniteError
from raymoe.model.router import backend_of
from raymoe.model.runner import Runner
from raymoe.model.trunk import ExpertBackend
from raymoe.types import DeviceName, ExpertKey

log = logging.getLogger(__name__)


class Examiner:
    """An ``ExpertBackend`` that looks at all that another computes.

    Attributes:
        culprit: the first expert whose output is not finite though its input is; None where there is none.
        spoiled_layer: the first MoE layer whose input is not finite already, before any culprit; None: none is.
    """

    def __init__(self, backend: ExpertBackend) -> None:
        self.culprit: ExpertKey | None = None
        self.spoiled_layer: int | None = None
        self._backend = backend

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the other does."""
        return self._backend.route(layer, experts_TK, weights_TK)

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """As the other does; the first output that is not finite is noted."""
        if self.culprit is not None or self.spoiled_layer is not None:
            return self._backend.compute(layer, hidden_TH, experts_TK)
        if not hidden_TH.isfinite().all():
            self.spoiled_layer = layer
        output_TKH = self._backend.compute(layer, hidden_TH, experts_TK)
        bad_TK = ~output_TKH.isfinite().all(dim=-1)
        if self.spoiled_layer is None and bad_TK.any():
            self.culprit = ExpertKey(layer=layer, expert=int(experts_TK[bad_TK.to(experts_TK.device)][0]))
        return output_TKH


class Blame:
    """Says why requests fail whose output is no number. Used by the engine's thread.

    Args:
        totals: counts them.
        device_of: whose an expert is; None: experts are not asked.
    """

    def __init__(self, runner: Runner, totals: Totals, device_of: Callable[[ExpertKey], DeviceName] | None) -> None:
        self._runner = runner
        self._totals = totals
        self._device_of = device_of

    def explained(self, sequence: Sequence, error: Exception) -> Exception:
        """The error that a request ends with: another one than ``error`` where that says that its output is no number.

        Routing is as it was, so whoever calls has set the scheduler's alpha.
        """
        if not isinstance(error, NotFiniteError):
            return error
        self._totals.not_finite += 1
        if self._device_of is None:
            return error
        try:
            examiner, is_finite = examine(self._runner, [*sequence.prompt, *sequence.answer])
        except Exception:  # a worker may be gone by now, or memory short; the request fails all the same
            log.exception("request %d: nobody could be found to blame", sequence.id)
            return error
        found = self._verdict(examiner, is_finite, self._device_of)
        log.error("request %d: %s", sequence.id, found)
        return found

    def _verdict(
        self, examiner: Examiner, is_finite: bool, device_of: Callable[[ExpertKey], DeviceName]
    ) -> NotFiniteError:
        key, spoiled = examiner.culprit, examiner.spoiled_layer
        if key is not None:
            device = device_of(key)
            self._totals.faults[key, device] += 1
            return ExpertOutputError(
                f'{NOT_FINITE}: layer {key.layer}, expert {key.expert} on device "{device}" is to blame; check that '
                "device's memory, and the checkpoint"
            )
        if spoiled is not None:
            return NotFiniteError(f"{NOT_FINITE}: the trunk is to blame, before MoE layer {spoiled}")
        if not is_finite:
            return NotFiniteError(f"{NOT_FINITE}: the trunk is to blame, after the last MoE layer")
        return NotFiniteError(f"{NOT_FINITE}, though it is when the same tokens are read again: a device is unreliable")


def examine(runner: Runner, tokens: list[int]) -> tuple[Examiner, bool]:
    """Read tokens once more; returns what was seen, and whether the output is finite."""
    modules = [module for _, module in experts_modules(runner.model)]
    examiner = Examiner(modules[0].raymoe_backend)
    with backend_of(modules, examiner):
        logits_V, _ = runner.prefill(tokens)
    return examiner, math.isfinite(logits_V.max())
