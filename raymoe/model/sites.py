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
        gate: norm and router as one product, where that is what they are.
    """

    def __init__(self, router: Router, norm: nn.Module | None, gate: "FoldedGate | None" = None) -> None:
        self.router = router
        self.norm = norm
        self.gate = gate
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
        if self.gate is not None and state_TH.device.type == "cpu":
            return self.router.rule.scores(self.gate.logits(state_TH.float().numpy()))
        # by their forward: a call would run the hooks that keep what belongs to the step under way
        hidden = state_TH if self.norm is None else self.norm.forward(state_TH)
        if self._in_batches:
            hidden = hidden.unsqueeze(0)
        return self.router.scores_of(self.router.logits_of(self.router.module.forward(hidden, *self._more)))

    def _keep_arguments(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._more = args[1:]  # some blocks pass their selection bias along
        self._in_batches = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dim() == 3

    def _keep(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._state = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if self._stops_here:
            raise Arrived


class FoldedGate:
    """A root mean square norm and a linear router as one matrix product: a quarter of the operations.

    ``norm(x) @ gate.T = (x @ (gate * weight).T) / rms(x)``.
    """

    def __init__(self, gate_EH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> None:
        self._gate_HE = np.ascontiguousarray((gate_EH.float() * weight_H.float()).cpu().numpy().T)
        self._epsilon = epsilon

    def logits(self, state_TH: np.ndarray) -> np.ndarray:
        """Router logits [T, E] for residual streams, float32."""
        if len(state_TH) == 1:
            square = float(state_TH[0].dot(state_TH[0])) / state_TH.shape[1]
            return state_TH @ self._gate_HE * np.float32((square + self._epsilon) ** -0.5)
        square_T1 = np.square(state_TH).mean(axis=1, keepdims=True)
        return state_TH @ self._gate_HE / np.sqrt(square_T1 + np.float32(self._epsilon))


def attach_sites(model: Any) -> list[MoeSite]:
    """The site of every MoE layer of a trunk, in the order of ``experts_modules``."""
    routers = attach_routers(model)
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    outputs: dict[int, tuple[nn.Module, torch.Tensor]] = {}
    received: dict[int, torch.Tensor] = {}
    alive: list[torch.Tensor] = []  # else memory would be used again, and addresses mean nothing

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            outputs[output.data_ptr()] = module, args[0]
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


def site_of(
    router: Router, received: torch.Tensor | None, outputs: dict[int, tuple[nn.Module, torch.Tensor]]
) -> MoeSite:
    """The site of a router that, in the forward just made, received this tensor.

    Args:
        outputs: norms and what they were given, by the address of what they returned.
    """
    if received is None or received.data_ptr() not in outputs:
        return MoeSite(router, None)
    norm, state = outputs[received.data_ptr()]
    return MoeSite(router, norm, folded_gate(router, norm, state))


def folded_gate(router: Router, norm: nn.Module, state: torch.Tensor) -> FoldedGate | None:
    """Norm and router as one product, if that gives the logits that they gave for ``state``; else None."""
    gate, weight = getattr(router.module, "weight", None), getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    hidden = state.shape[-1]
    if not isinstance(gate, torch.Tensor) or gate.shape != (router.experts, hidden):
        return None
    if not isinstance(weight, torch.Tensor) or weight.shape != (hidden,) or not isinstance(epsilon, float):
        return None
    states_TH = state.reshape(-1, hidden).float().cpu().numpy()
    logits_TE = router.logits_TE.float().cpu().numpy()
    tolerance = 1e-3 if state.dtype == torch.float32 else 3e-2  # a forecast, so that rounding does not matter
    for offset in (0.0, 1.0):  # some norms store their weight minus one
        folded = FoldedGate(gate, weight + offset, epsilon)
        if np.allclose(folded.logits(states_TH), logits_TE, rtol=tolerance, atol=tolerance):
            return folded
    return None
