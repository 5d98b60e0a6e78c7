"""Modules of the decode step on a GPU with one kernel, or a few, in place of their many small ones.

As on a CPU (``model.blocks``), a module is found by its parts, besides which it may have none, and replaced only if, on
random input, the kernels give what it gives. For every other shape it keeps its own forward. Attention is replaced for
tokens that are read into a ``FixedCache`` only.

H hidden, D width of a head, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from raymoe.kernels.gpu import MOST_COLUMNS, MOST_EXPERTS, GpuKernels
from raymoe.model.blocks import ATTENTION_PARTS, HEAD_NORMS, KNOWN_ARGUMENTS, SCALES, TRIED, has_more, takes_more
from raymoe.model.fixed_cache import FixedCache, grown

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-7}  # of the largest output
MOST_ROWS = 64  # of a norm: a token's states or heads


def use_gpu_kernels(model: Any, kernels: GpuKernels) -> int:
    """Route single tokens through GPU kernels where they prove to do the same. Returns how many modules that are."""
    if not kernels.supports(model.dtype):
        return 0
    changed = 0
    for module in list(model.modules()):
        replacement = replacement_for(module, model.config.get_text_config(decoder=True), kernels)
        if replacement is not None:
            module.forward = replacement
            changed += 1
    return changed


@torch.no_grad()
def replacement_for(module: Any, config: Any, kernels: GpuKernels) -> Any:
    """What does the same for one token, or None."""
    try:
        return (
            row_linear(module, kernels)
            or row_norm(module, kernels)
            or row_router(module, kernels)
            or fixed_attention(module, config, kernels)
        )
    except Exception:  # a module that wants other arguments than it is tried with keeps its own forward
        return None


class RowLinear:
    """Replaces the forward of a linear layer."""

    def __init__(self, module: nn.Linear, kernels: GpuKernels) -> None:
        self._module = module
        self._kernels = kernels

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output for [..., in]."""
        weight, bias = self._module.weight, self._module.bias
        if input.numel() != weight.shape[1] or input.dtype != weight.dtype:
            return nn.functional.linear(input, weight, bias)
        output = input.new_empty((*input.shape[:-1], weight.shape[0]))
        self._kernels.linear(input.contiguous(), weight, bias, output)
        return output


def row_linear(module: Any, kernels: GpuKernels) -> RowLinear | None:
    """For exactly ``nn.Linear``."""
    if type(module) is not nn.Linear or not module.weight.is_contiguous() or not kernels.supports(module.weight.dtype):
        return None
    return RowLinear(module, kernels)


class RowNorm:
    """Replaces the forward of a root mean square norm.

    Attributes:
        offset: what is added to the stored weight; early: whether the normalised value is rounded before it.
    """

    def __init__(self, module: Any, kernels: GpuKernels, epsilon: float, offset: float, early: bool) -> None:
        self._own_forward = module.forward
        self._kernels = kernels
        self.weight: torch.Tensor = module.weight
        self.epsilon = epsilon
        self.offset = offset
        self.early = early

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm over the last dimension."""
        columns = self.weight.shape[0]
        if (
            hidden_states.dtype != self.weight.dtype
            or hidden_states.shape[-1] != columns
            or hidden_states.numel() > MOST_ROWS * columns
        ):
            return self._own_forward(hidden_states)
        hidden_states = hidden_states.contiguous()
        output = torch.empty_like(hidden_states)
        self._kernels.rms_norm(hidden_states, self.weight, self.epsilon, self.offset, self.early, output)
        return output


def row_norm(module: Any, kernels: GpuKernels) -> RowNorm | None:
    """The form of the kernel that does what ``module`` does, or None."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(epsilon, float) or not isinstance(weight, torch.Tensor) or has_more(module, ("weight",)):
        return None
    if weight.dim() != 1 or weight.shape[0] > MOST_COLUMNS or not kernels.supports(weight.dtype):
        return None
    probe = random_rows(weight.shape[0], weight)[:, :3] * 3.0
    expected = module.forward(probe)
    for offset in (0.0, 1.0):
        for early in (True, False):
            norm = RowNorm(module, kernels, epsilon, offset, early)
            if is_alike(norm(probe), expected):
                return norm
    return None


class RowRouter:
    """Replaces the forward of a linear router that returns logits, weights and experts, in any order.

    Args:
        order: the places of logits, weights and experts in what the module returns.
        shapes: of these three, for one token; dtypes: likewise.
    """

    def __init__(
        self, module: Any, kernels: GpuKernels, rule: tuple[bool, bool, float], outputs: tuple[torch.Tensor, ...]
    ) -> None:
        self._own_forward = module.forward
        self._kernels = kernels
        self._weight: torch.Tensor = module.weight
        self._rule = rule
        self._outputs = [(tuple(value.shape), value.dtype) for value in outputs]
        self._order = places(outputs, self._weight.shape[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for hidden states [.., H]."""
        hidden = args[0] if len(args) == 1 and not kwargs else None
        weight = self._weight
        if hidden is None or hidden.numel() != weight.shape[1] or hidden.dtype != weight.dtype:
            return self._own_forward(*args, **kwargs)
        outputs = [torch.empty(shape, dtype=dtype, device=weight.device) for shape, dtype in self._outputs]
        logits, weights, experts = (outputs[place] for place in self._order)
        self._kernels.linear(hidden.contiguous(), weight, None, logits)
        self._kernels.route(logits, *self._rule, experts, weights)
        return tuple(outputs)


def places(outputs: tuple[torch.Tensor, ...], experts: int) -> tuple[int, int, int]:
    """Which of three outputs are logits, weights and experts. Raises ValueError where they are something else."""
    chosen = next(i for i, value in enumerate(outputs) if value.dtype == torch.int64)
    rest = [i for i in range(3) if i != chosen]
    logits = next(i for i in rest if outputs[i].numel() == experts)
    weights = next(i for i in rest if i != logits)
    if outputs[weights].numel() != outputs[chosen].numel():
        raise ValueError("there are not as many weights as experts")
    return logits, weights, chosen


def row_router(module: Any, kernels: GpuKernels) -> RowRouter | None:
    """For a router whose only parameter is its matrix, and that chooses by softmax or sigmoid."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or has_more(module, ("weight",)):
        return None
    if type(module) is nn.Linear or not 2 <= weight.shape[0] <= MOST_EXPERTS or not kernels.supports(weight.dtype):
        return None
    probes = [random_rows(weight.shape[1], weight)[0, row : row + 1] for row in range(len(SCALES))]
    expected = [module.forward(probe) for probe in probes]
    if not isinstance(expected[0], tuple) or len(expected[0]) != 3:
        return None
    for sigmoid in (False, True):
        for renormalised in (True, False):
            router = RowRouter(module, kernels, (sigmoid, renormalised, 1.0), expected[0])
            if all(chooses_alike(router(probe), wanted) for probe, wanted in zip(probes, expected, strict=True)):
                return router
    return None


def chooses_alike(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether two routers agree: the same experts, unless rounding ties them, and weights alike."""
    logits, weights, experts = places(expected, max(value.numel() for value in expected))
    if found[experts].sort().values.tolist() != expected[experts].sort().values.tolist():
        return False
    return is_alike(found[logits], expected[logits]) and is_alike(
        found[weights].sort().values, expected[weights].sort().values
    )


class FixedAttention:
    """Replaces the forward of attention, for one token that is read into a ``FixedCache``.

    The projections become one matrix; the module's own are views of it.

    Args:
        norms: of the heads of queries and keys; none where the architecture has none.
    """

    def __init__(self, module: Any, kernels: GpuKernels, norms: tuple[RowNorm, ...]) -> None:
        self._own_forward = module.forward
        self._kernels = kernels
        self._output: nn.Module = module.o_proj
        self._layer: int = module.layer_idx
        self._width: int = module.head_dim
        self._heads = module.q_proj.out_features // self._width
        self._kv_heads = module.k_proj.out_features // self._width
        scaling = getattr(module, "scaling", None)
        self._scale: float = scaling if isinstance(scaling, float) else self._width**-0.5
        self._norms = norms
        self._weight, self._bias = joined([module.q_proj, module.k_proj, module.v_proj])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output for hidden states [1, 1, H], and None for the attention weights."""
        hidden = args[0] if len(args) == 1 else kwargs.get("hidden_states") if not args else None
        rotation, cache = kwargs.get("position_embeddings"), kwargs.get("past_key_values")
        if (
            not isinstance(cache, FixedCache)
            or hidden is None
            or hidden.numel() != self._weight.shape[1]
            or hidden.dim() != 3
            or not isinstance(rotation, tuple)
            or rotation[0].numel() != self._width
            or any(value is not None for name, value in kwargs.items() if name not in TRIED | KNOWN_ARGUMENTS)
        ):
            return self._own_forward(*args, **kwargs)
        return self._attend(hidden.contiguous(), rotation[0].contiguous(), rotation[1].contiguous(), cache), None

    def _attend(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: FixedCache) -> torch.Tensor:
        kernels, layer = self._kernels, cache.static[self._layer]
        mixed = hidden.new_empty((self._heads + 2 * self._kv_heads, self._width))
        kernels.linear(hidden, self._weight, self._bias, mixed)
        query = hidden.new_empty((self._heads, self._width))
        norms = (self._norms[0].weight, self._norms[1].weight) if self._norms else None
        epsilon, offset, early = (
            (self._norms[0].epsilon, self._norms[0].offset, self._norms[0].early) if self._norms else (0.0, 0.0, False)
        )
        keys, values = layer.keys[0], layer.values[0]
        kernels.rope(mixed, cos, sin, cache.position, norms, epsilon, offset, early, query, keys, values)
        attended = hidden.new_empty((1, 1, self._heads * self._width))
        scratch = cache.scratch(self._heads, self._width)
        kernels.attend(query, keys, values, cache.position, self._scale, scratch, attended)
        return self._output(attended)


def joined(parts: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of several linear layers as one matrix, of which theirs become views; and so their biases."""
    weight: torch.Tensor = torch.cat([part.weight.data for part in parts])
    biases = [part.bias for part in parts]
    bias = None if any(value is None for value in biases) else torch.cat([value.data for value in biases])
    rows = [part.out_features for part in parts]
    for part, mine in zip(parts, weight.split(rows), strict=True):
        part.weight = nn.Parameter(mine, requires_grad=False)
    return weight, bias


def fixed_attention(module: Any, config: Any, kernels: GpuKernels) -> FixedAttention | None:
    """For a block of four projections that rotates half against half and attends to all that came before."""
    parts: list[Any] = [getattr(module, name, None) for name in ATTENTION_PARTS]
    width, layer = getattr(module, "head_dim", None), getattr(module, "layer_idx", None)
    if not all(type(part) is nn.Linear for part in parts) or not isinstance(width, int) or not isinstance(layer, int):
        return None
    if has_more(module, ATTENTION_PARTS + HEAD_NORMS) or takes_more(module):
        return None
    queries, keys, values, output = (part.weight.shape for part in parts)
    if width < 16 or width & (width - 1) or queries[0] % width or keys[0] % width or keys != values:
        return None
    if keys[0] == 0 or queries[0] % keys[0] or output[1] != queries[0]:
        return None
    if len({part.bias is None for part in parts[:3]}) > 1:
        return None
    norms = head_norms(module, kernels)
    if norms is None:
        return None
    replacement = FixedAttention(module, kernels, norms)
    return replacement if attends_alike(module, replacement, config) else None


def head_norms(module: Any, kernels: GpuKernels) -> tuple[RowNorm, ...] | None:
    """The norms over each head of queries and keys, none where there are none; None where the kernel has no such."""
    modules: list[Any] = [getattr(module, name, None) for name in HEAD_NORMS]
    if modules == [None, None]:
        return ()
    found = [None if norm is None else row_norm(norm, kernels) for norm in modules]
    if any(norm is None or norm.weight.shape != (module.head_dim,) for norm in found):
        return None
    norms = tuple(norm for norm in found if norm is not None)
    return norms if len({(norm.epsilon, norm.offset, norm.early) for norm in norms}) == 1 else None


def attends_alike(module: Any, replacement: FixedAttention, config: Any) -> bool:
    """Whether both give the same for some tokens one after the other, and leave the same in their caches."""
    weight = module.q_proj.weight
    theirs, mine = DynamicCache(), FixedCache(config, 2 * len(SCALES), weight.device)
    if not mine.is_plain:
        return False
    scales = torch.tensor(SCALES, dtype=weight.dtype, device=weight.device)
    hidden = random_rows(weight.shape[1], weight) * scales[None, :, None]
    cos, sin = random_rows(module.head_dim, weight), random_rows(module.head_dim, weight).flip(-1)
    own = mine.static[module.layer_idx]
    for token in range(len(SCALES)):
        place = slice(token, token + 1)
        given = {"hidden_states": hidden[:, place], "position_embeddings": (cos[:, place], sin[:, place])}
        expected = replacement._own_forward(**given, attention_mask=None, past_key_values=theirs)
        if not isinstance(expected, tuple) or len(expected) != 2 or expected[1] is not None:
            return False
        if token == 0:
            first = grown(theirs)[module.layer_idx]
            own.lazy_initialization(first.keys, first.values)
        mine.position.fill_(token)
        if not is_alike(replacement(**given, attention_mask=None, past_key_values=mine)[0], expected[0]):
            return False
    held = grown(theirs)[module.layer_idx]
    return is_alike(own.keys[:, :, : len(SCALES)], held.keys) and is_alike(own.values[:, :, : len(SCALES)], held.values)


def random_rows(columns: int, like: torch.Tensor) -> torch.Tensor:
    """[1, tokens, columns], the same each time, as typed and placed as ``like``."""
    rows = torch.randn((1, len(SCALES), columns), generator=torch.Generator().manual_seed(columns))
    return rows.to(like.device, like.dtype)


def is_alike(found: torch.Tensor, expected: Any) -> bool:
    """Whether two results differ by no more than rounding."""
    if not isinstance(expected, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    scale = expected.float().abs().max().item()
    return torch.allclose(found.float(), expected.float(), rtol=0.0, atol=TOLERANCE[expected.dtype] * (scale or 1.0))
