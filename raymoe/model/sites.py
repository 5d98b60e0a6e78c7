"""Where each MoE layer reads the residual stream: what forecasts of routing need to see of a trunk.

A layer's site is its router and the norm before it. The norm is found, not named: in a probe, it is the module whose
output is the very tensor that the router receives. Hooks then keep what enters the norm in every step.

T tokens, E experts, H hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.router import ProbeExperts, Router, attach_routers, backend_of, probe_tokens
from raymoe.model.runner import Runner


class Arrived(Exception):
    """A run ahead has come to the layer's norm. Never leaves ``MoeSite``."""


class MoeSite:
    """One MoE layer in the trunk.

    Attributes:
        router: scores and rule.
        norm: what stands between the residual stream and the router; None where nothing does, or it was not found.
        gate_EH: the router's weight where logits are the plain product with it, which then is all there is to do.
    """

    def __init__(self, router: Router, norm: nn.Module | None, gate_EH: torch.Tensor | None = None) -> None:
        self.router = router
        self.norm = norm
        self.gate_EH = gate_EH
        self._state: torch.Tensor | None = None
        self._more: tuple[Any, ...] = ()
        self._in_batches = False
        self._stops_here = False
        if router.module is not None:
            router.module.register_forward_pre_hook(self._keep_arguments)
        watched = norm if norm is not None else router.module
        if watched is not None:
            watched.register_forward_pre_hook(self._keep)

    @property
    def state_TH(self) -> torch.Tensor | None:
        """The residual stream before the norm in the step under way, as rows of tokens."""
        return None if self._state is None else self._state.reshape(-1, self._state.shape[-1])

    def state_at_arrival(self, run: Callable[[], None]) -> torch.Tensor | None:
        """The residual stream [T, H] with which ``run`` comes to the norm, where it ends; None if it doesn't come by.

        What is known of the step under way stays.
        """
        with self.unchanged():
            self._stops_here = True
            try:
                run()
            except Arrived:
                return self.state_TH
            finally:
                self._stops_here = False
        return None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is run meanwhile, what is known of the step under way is the same again afterwards."""
        kept = self._state, self._more
        try:
            yield
        finally:
            self._state, self._more = kept

    def gate_scores(self, state_TH: torch.Tensor) -> np.ndarray:
        """This layer's gate scores [T, E] for a residual stream."""
        assert self.router.rule is not None and self.router.module is not None
        # by their forward: a call would run the hooks that keep what belongs to the step under way
        hidden = state_TH if self.norm is None else self.norm.forward(state_TH)
        return self.router.scores_of(self._logits_TE(hidden))

    def _logits_TE(self, hidden: torch.Tensor) -> torch.Tensor:
        """The router's logits, without its choice where they come from a plain product."""
        assert self.router.module is not None
        if self.gate_EH is not None:
            return nn.functional.linear(hidden, self.gate_EH)
        if self._in_batches:
            hidden = hidden.unsqueeze(0)
        return self.router.logits_of(self.router.module.forward(hidden, *self._more))

    def _keep_arguments(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._more = args[1:]  # some blocks pass their selection bias along
        self._in_batches = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dim() == 3

    def _keep(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._state = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if self._stops_here:
            raise Arrived


def attach_sites(model: Any) -> list[MoeSite]:
    """The site of every MoE layer of a trunk, in the order of ``experts_modules``."""
    routers = attach_routers(model)
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    outputs: dict[int, nn.Module] = {}
    received: dict[int, torch.Tensor] = {}
    alive: list[torch.Tensor] = []  # else memory would be used again, and addresses mean nothing

    def note_output(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs[output.data_ptr()] = module
            alive.append(output)

    def note_input(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                received[index] = args[0]

        return hook

    experts = [module for _, module in experts_modules(model)]
    with backend_of(experts, ProbeExperts()), ExitStack() as stack:
        for module in norms:
            stack.callback(module.register_forward_hook(note_output).remove)
        for index, router in enumerate(routers):
            if router.module is not None:
                stack.callback(router.module.register_forward_pre_hook(note_input(index)).remove)
        Runner(model).prefill(probe_tokens(model))
    return [site_of(router, received.get(index), outputs) for index, router in enumerate(routers)]


def site_of(router: Router, received: torch.Tensor | None, outputs: dict[int, nn.Module]) -> MoeSite:
    """The site of a router that, in the forward just made, received this tensor.

    Args:
        outputs: norms by the address of what they returned.
    """
    if received is None:
        return MoeSite(router, None)
    gate_EH = getattr(router.module, "weight", None)
    if (
        not isinstance(gate_EH, torch.Tensor)
        or gate_EH.shape != (router.experts, received.shape[-1])
        or received.dtype != gate_EH.dtype
        or not torch.allclose(
            nn.functional.linear(received.reshape(-1, received.shape[-1]), gate_EH),
            router.logits_TE,
            rtol=1e-3,
            atol=1e-5,
        )
    ):
        gate_EH = None
    return MoeSite(router, outputs.get(received.data_ptr()), gate_EH)
