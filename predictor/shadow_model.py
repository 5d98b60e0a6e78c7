"""The model that casts the shadow: a trunk of its own, quantised experts, and the caches of its sequences.

B rows in lockstep, T tokens, K experts per token, E experts, H hidden.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from transformers.cache_utils import Cache

from predictor.thinning import Thinning
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.errors import FrameError
from raymoe.model.fast import use_native_kernels
from raymoe.model.kv import KvEntries, abilities, align
from raymoe.model.rewind import Rewind
from raymoe.model.router import Router, attach_routers
from raymoe.model.runner import Runner, SequenceState
from raymoe.model.trunk import build_trunk

log = logging.getLogger(__name__)

OnRouted = Callable[[int, np.ndarray, np.ndarray], None]
"""Told of each layer's routing: layer, experts [T, K], gate scores [T, E]. What it raises ends the forward."""


class Experts(Protocol):
    """Whoever computes the shadow's routed experts."""

    nbytes: int

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted outputs [T, K, H]."""
        ...


class ShadowModel:
    """Runs forwards. Used by one thread.

    Args:
        checkpoint: in the precision of the trunk.
        experts: its routed experts, in theirs.
        depth: steps that may have to be taken back.
        thinning: what decode steps leave out; nothing where omitted.

    Attributes:
        on_routed: told of each layer's routing while a forward runs.
        nbytes: of all its weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: Experts,
        device: torch.device,
        *,
        depth: int = 0,
        thinning: Thinning | None = None,
    ) -> None:
        self.on_routed: OnRouted = lambda layer, experts_TK, scores_TE: None
        self.nbytes = checkpoint.trunk_bytes + experts.nbytes
        self._experts = experts
        self._depth = depth
        self._thinning = thinning or Thinning()
        self._in_prompt = False
        self._states: dict[int, tuple[SequenceState, Rewind]] = {}
        self._has_told = False
        self._routers: list[Router] = []
        model = build_trunk(checkpoint, self, device)
        native = use_native_kernels(model) > 0
        self._routers = attach_routers(model)
        self._runner = Runner(model, single_threaded_decode=native)

    # --- what the trunk calls ---------------------------------------------------------------------------

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's own choice, which is told, as far as it is to be computed."""
        if not self._routers:  # they are being looked for
            return experts_TK, weights_TK
        chosen_TK = experts_TK.cpu().numpy()
        self.on_routed(layer, chosen_TK, self._routers[layer].scores_or_weights(chosen_TK, weights_TK))
        if self._in_prompt:
            return experts_TK, weights_TK
        return self._thinning.kept(layer, experts_TK, weights_TK)

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every chosen expert for every token, [T, K, H]."""
        if not experts_TK.shape[1]:
            return hidden_TH.new_zeros((len(hidden_TH), 0, hidden_TH.shape[1]))
        return self._experts.compute(layer, hidden_TH, experts_TK)

    # --- sequences --------------------------------------------------------------------------------------

    def prefill(self, sequence: int, rows: list[tuple[int, ...]]) -> torch.Tensor:
        """Read prompts of equal length; returns the logits [B, vocabulary] after each."""
        self._in_prompt = True
        try:
            logits_BV, state = self._runner.start([list(row) for row in rows])
        finally:
            self._in_prompt = False
        self._states[sequence] = state, Rewind(state, self._depth)
        if not self._has_told:
            self._has_told = True
            log.info("the shadow aligns %s", abilities(state.kwargs.get("past_key_values")).words)
        return logits_BV

    def decode(self, sequence: int, tokens: list[int]) -> torch.Tensor:
        """Read one more token of every row; returns the logits [B, vocabulary] after each.

        A forward that raises leaves the sequence as it was, where it may run ahead.
        """
        state, rewind = self._states[sequence]
        with rewind.step():
            return self._runner.go_on(state, tokens)

    def may_run_ahead(self, sequence: int) -> bool:
        """Whether its steps can be taken back."""
        return sequence in self._states and self._states[sequence][1].possible

    def back_to(self, sequence: int, length: int) -> None:
        """Take back what lies beyond ``length`` positions."""
        self._states[sequence][1].back_to(length)

    def align(self, sequence: int, start: int, entries: KvEntries) -> bool:
        """Take over keys and values of positions from ``start`` on; those that lie ahead are appended if that is all.

        Returns whether the caches hold all of these positions now. Entries of another layout change nothing.
        """
        state, rewind = self._states[sequence]
        cache = state.kwargs.get("past_key_values")
        if not isinstance(cache, Cache):
            return False
        try:
            if rewind.possible:
                return rewind.align(start, entries, append=self._runner.takes_rows)
            return align(cache, start, entries)
        except FrameError as error:
            log.warning("the shadow can't be aligned: %s", error)
            return False

    def forget(self, sequence: int) -> None:
        """Free the caches of a sequence."""
        self._states.pop(sequence, None)
