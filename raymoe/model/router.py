"""The routers of a trunk: the last logits of each MoE layer, and the rule by which they became experts and weights.

Nothing here names an architecture. A probe runs a few dozen random tokens through the trunk, with experts that
return zeros, and records what every experts module receives and what the modules beside it return. The module
whose output a rule turns into those experts and weights, for every token, is the layer's router.

T tokens, E experts, K experts per token, H hidden.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.router_rule import RouterHints, RouterRule, RoutingSample, fit_rule
from raymoe.model.runner import Runner
from raymoe.model.trunk import ExpertBackend

PROBE_TOKENS = 64  # enough that a wrong bias or group limit changes some token's choice
# relative: scores, sum, quotient and scaling are each rounded once, by 2^-8 at most in bfloat16 and 2^-11 in float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}


class Router:
    """One MoE layer's router in the trunk.

    Attributes:
        path: the layer's experts module within the model.
        module: what computes the logits; None without a rule.
        experts: the number of routed experts.
        rule: how the architecture routes in this layer; None where no rule reproduces it. Experts of such a layer
            can't be substituted, and its logits are not captured.
    """

    __slots__ = ("_index", "_logits", "experts", "module", "path", "rule")

    def __init__(
        self, path: str, rule: RouterRule | None, experts: int, module: nn.Module | None, index: int | None
    ) -> None:
        self.path = path
        self.rule = rule
        self.module = module
        self.experts = experts
        self._index = index
        self._logits: torch.Tensor | None = None

    @property
    def logits_TE(self) -> torch.Tensor:
        """What the router returned in the last forward, detached, not copied."""
        assert self._logits is not None, f"{self.path}: no logits; there is no rule, or there was no forward yet"
        return self._logits.detach().reshape(-1, self.experts)

    def logits_of(self, output: Any) -> torch.Tensor:
        """The logits [T, E] in what the router's module returned."""
        return (output if self._index is None else output[self._index]).detach().reshape(-1, self.experts)

    def scores_of(self, logits_TE: torch.Tensor) -> np.ndarray:
        """Gate scores [T, E] in float32 by the layer's rule; the common one in a single operation."""
        assert self.rule is not None
        if self.rule.score == "softmax":
            return torch.softmax(logits_TE.float(), dim=-1).cpu().numpy()
        return self.rule.scores(logits_TE.float().cpu().numpy())

    def scores_or_weights(self, chosen_TK: np.ndarray, weights_TK: torch.Tensor) -> np.ndarray:
        """Gate scores [T, E] of the last forward; without a rule what is known of them, the weights of the chosen."""
        if self.rule is not None:
            return self.scores_of(self.logits_TE)
        scores_TE = np.zeros((len(chosen_TK), self.experts), dtype=np.float32)
        np.put_along_axis(scores_TE, chosen_TK, weights_TK.float().cpu().numpy(), axis=1)
        return scores_TE

    def capture(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """A forward hook for the router's module; it runs at every layer of every step, so it only keeps."""
        self._logits = output if self._index is None else output[self._index]


class ProbeExperts:
    """An ``ExpertBackend`` that records what each layer's experts receive, and returns zeros.

    Attributes:
        received: by layer, the router's (experts [T, K], weights [T, K]).
    """

    def __init__(self) -> None:
        self.received: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's own choice."""
        self.received[layer] = (experts_TK, weights_TK)
        return experts_TK, weights_TK

    def compute(self, _layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Zeros [T, K, H]."""
        return hidden_TH.new_zeros((*experts_TK.shape, hidden_TH.shape[-1]))


class BlockProbe:
    """Records what the modules beside a layer's experts return while the probe runs.

    Attributes:
        block: the module that holds the experts module and, somewhere, the router.
        experts: the number of routed experts.
    """

    def __init__(self, block: nn.Module, experts_module: Any) -> None:
        self.block = block
        self.experts: int = experts_module.num_experts
        within_experts = set(experts_module.modules())
        self._others = [module for module in block.modules() if module is not block and module not in within_experts]
        self._outputs: dict[nn.Module, dict[int | None, torch.Tensor]] = {}

    def hooks(self) -> Iterator[Any]:
        """Install what records; the handles that remove it."""
        for module in self._others:
            yield module.register_forward_hook(self._record)

    def candidates(self, tokens: int) -> Iterator[tuple[nn.Module, int | None, torch.Tensor]]:
        """Modules that returned one value per token and expert, outer ones first: (module, place in tuple, value)."""
        for module in self._others:  # outputs are in the order of returning, inner ones first
            for place, value in self._outputs.get(module, {}).items():
                if value.numel() == tokens * self.experts:
                    yield module, place, value.reshape(-1, self.experts)

    def _record(self, module: nn.Module, _args: Any, output: Any) -> None:
        values = enumerate(output) if isinstance(output, (tuple, list)) else [(None, output)]
        self._outputs[module] = {
            place: value
            for place, value in values
            if isinstance(value, torch.Tensor) and value.dtype in TOLERANCE and value.shape[-1:] == (self.experts,)
        }


def attach_routers(model: Any) -> list[Router]:
    """Find the router of every MoE layer of a trunk, in the order of ``experts_modules``, and capture its logits.

    Apart from the capturing hooks the model is left as it was.
    """
    layers = experts_modules(model)
    probes = [BlockProbe(model.get_submodule(path.rpartition(".")[0]), module) for path, module in layers]
    backend = ProbeExperts()
    with backend_of([module for _, module in layers], backend), ExitStack() as stack:
        for probe in probes:
            for handle in probe.hooks():
                stack.callback(handle.remove)
        Runner(model).prefill(probe_tokens(model))
    config = model.config.get_text_config(decoder=True)
    return [
        attach(path, probe, backend.received.get(module.raymoe_layer), config)
        for (path, module), probe in zip(layers, probes, strict=True)
    ]


@contextmanager
def backend_of(modules: list[Any], backend: ExpertBackend) -> Iterator[None]:
    """While open, the experts modules' backend is this one."""
    own_backends = [module.raymoe_backend for module in modules]
    try:
        for module in modules:
            module.raymoe_backend = backend
        yield
    finally:
        for module, own_backend in zip(modules, own_backends, strict=True):
            module.raymoe_backend = own_backend


def probe_tokens(model: Any) -> list[int]:
    """Random token ids, the same each time, from the middle of the vocabulary: special tokens lie at its ends."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary // 4, 3 * vocabulary // 4, (PROBE_TOKENS,), generator=generator).tolist()


def attach(path: str, probe: BlockProbe, received: tuple[torch.Tensor, torch.Tensor] | None, config: Any) -> Router:
    """The router of the layer that ``probe`` recorded, capturing from now on where a rule fits.

    Args:
        received: the layer's experts [T, K] and weights [T, K]; None where the probe did not come by.
    """
    if received is not None and received[1].dtype in TOLERANCE:
        experts_TK, weights_TK = received
        for module, place, logits_TE in probe.candidates(experts_TK.shape[0]):
            sample = RoutingSample(
                logits_TE=as_float32(logits_TE),
                experts_TK=experts_TK.cpu().numpy(),
                weights_TK=as_float32(weights_TK),
                tolerance=max(TOLERANCE[logits_TE.dtype], TOLERANCE[weights_TK.dtype]),
            )
            rule = fit_rule(sample, hints_at(module, probe.block, config, probe.experts))
            if rule is not None:
                router = Router(path, rule, probe.experts, module, place)
                module.register_forward_hook(router.capture)
                return router
    return Router(path, None, probe.experts, None, None)


def hints_at(router: nn.Module, block: nn.Module, config: Any, experts: int) -> RouterHints:
    """What a router, the block that it is in, and the configuration say about its rule, by kind of value.

    Only tensors in the router and directly in the block count: a block may be a whole decoder layer.
    """
    tensors = [
        *router.named_parameters(),
        *router.named_buffers(),
        *block.named_parameters(recurse=False),
        *block.named_buffers(recurse=False),
    ]
    per_expert = [(name.rpartition(".")[2], tensor) for name, tensor in tensors if tensor.numel() == experts]
    numbers = {
        name: value
        for owner in (config, block, router)
        for name, value in vars(owner).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    group_counts = {int(value) for name, value in numbers.items() if "group" in name and value >= 1}
    return RouterHints(
        biases=[as_float32(tensor).reshape(-1) for name, tensor in per_expert if "bias" in name and tensor.any()],
        scales=[as_float32(tensor).reshape(-1) for name, tensor in per_expert if "scale" in name],
        numbers=[float(value) for value in numbers.values()],
        groups=[
            (groups, kept) for kept, groups in itertools.combinations(sorted(group_counts), 2) if experts % groups == 0
        ],
    )


def as_float32(tensor: torch.Tensor) -> np.ndarray:
    """A copy in numpy."""
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()
