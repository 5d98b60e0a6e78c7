"""Whole blocks of the decode step in a call or two: gated MLPs, and attention around its cache.

At one token these blocks are some five and some thirty-five small operations, each of which costs more to begin than
to do. A block is found by its parts, besides which it may have none, and replaced only if, on random input, the kernels
give what it gives; for every other shape, with a mask, or with arguments that it was not tried with, it keeps its own
forward.

H hidden, D width of a head, L length of the cache.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from raymoe.kernels.native import NativeKernels
from raymoe.model.norms import SmallNorm, small_norm
from raymoe.model.roomy import RoomyLayer

MOST_ROWS = 64  # of linear layers and MLPs; with more, torch's matrix products are the faster ones
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}  # of the largest output: a sum of many products, rounded apart
KNOWN_ARGUMENTS = {"position_ids", "use_cache", "output_attentions", "output_router_logits", "cache_position"}
"""What decoder layers pass on to attention that changes nothing for one token without a mask."""
SCALES = (1.0, 1.0, 1.0, 8.0, 8.0)  # of the tokens tried: what bends large scores only shows with these
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


class FewRowsMlp:
    """Replaces the forward of a gated SiLU MLP."""

    def __init__(self, module: Any, kernels: NativeKernels) -> None:
        self._own_forward = module.forward
        self._kernels = kernels
        self._weights = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
        self._columns: int = module.gate_proj.in_features

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output for hidden states [..., H]."""
        gate, up, down = self._weights
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if hidden is None or hidden.dtype != gate.dtype or not 1 <= hidden.numel() // self._columns <= MOST_ROWS:
            return self._own_forward(*args, **kwargs)
        output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self._kernels.gated(gate, up, down, hidden.contiguous(), output)
        return output


class OneTokenAttention:
    """Replaces the forward of attention whose queries and keys are rotated half against half.

    The cache is the architecture's own, and is updated as the block would.

    Args:
        norms: of the heads of queries and keys; none where the architecture has none.
    """

    def __init__(self, module: Any, kernels: NativeKernels, norms: tuple[SmallNorm, ...] = ()) -> None:
        self._own_forward = module.forward
        self._kernels = kernels
        self._output: nn.Module = module.o_proj
        self._layer: int = module.layer_idx
        self._columns: int = module.q_proj.in_features
        self._dtype = module.q_proj.weight.dtype
        self._parts = [
            tensor for part in (module.q_proj, module.k_proj, module.v_proj) for tensor in (part.weight, part.bias)
        ]  # kept alive for their addresses
        self._parts += [norm.weight for norm in norms] or [None, None]
        self._addresses = np.array([0 if part is None else part.data_ptr() for part in self._parts], dtype=np.uint64)
        self._epsilons = np.array([norm.epsilon for norm in norms] or [0.0, 0.0], dtype=np.float32)
        self._early = bool(norms) and norms[0].early
        self._width: int = module.head_dim
        self._heads = module.q_proj.out_features // self._width
        self._kv_heads = module.k_proj.out_features // self._width
        scaling = getattr(module, "scaling", None)
        self._scale: float = scaling if isinstance(scaling, float) else self._width**-0.5

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output for hidden states [1, 1, H], and None for the attention weights."""
        taken = self._taken(args, kwargs)
        if taken is None:
            return self._own_forward(*args, **kwargs)
        hidden, cos, sin, cache = taken
        heads, kv_heads, width = self._heads, self._kv_heads, self._width
        mixed = hidden.new_empty((1, heads + 2 * kv_heads, width))
        self._kernels.projections(self._addresses, hidden, cos, sin, heads, mixed, self._epsilons, self._early)
        keys, values = mixed[0, heads:].view(2, 1, kv_heads, 1, width).unbind(0)
        keys_LD, values_LD = cache.update(keys, values, self._layer)
        attended = hidden.new_empty((1, 1, heads * width))
        self._kernels.attention(mixed[0, :heads], keys_LD[0], values_LD[0], self._scale, attended)
        return self._output(attended), None

    def together(self, counts: Sequence[int], caches: Sequence[Cache], args: Any, kwargs: Any) -> Any:
        """The same for tokens of several sequences [tokens, 1, H], so many of each; None where kernels can't do it.

        Each cache must have room, as ``RoomyLayer`` has.
        """
        layers: list[Any] = [cache.layers[self._layer] for cache in caches]
        taken = self._taken(args, kwargs, sum(counts))
        if taken is None or not all(type(layer) is RoomyLayer for layer in layers):
            return None
        hidden, cos, sin, _ = taken
        shape = (self._kv_heads, self._width)
        places = [
            place for layer, count in zip(layers, counts, strict=True) for place in layer.extend(count, shape, hidden)
        ]
        mixed = hidden.new_empty((len(places), self._heads + 2 * self._kv_heads, self._width))
        self._kernels.projections(self._addresses, hidden, cos, sin, self._heads, mixed, self._epsilons, self._early)
        attended = hidden.new_empty((len(places), 1, self._heads * self._width))
        longest = max(position for *_, position in places) + 1
        self._kernels.attention_rows(
            mixed, np.array(places, dtype=np.int64), self._heads, longest, self._scale, attended
        )
        return self._output(attended), None

    def _taken(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Cache] | None:
        """Hidden states, cosines, sines and cache of a call that the kernels can do; else None."""
        hidden = args[0] if len(args) == 1 else kwargs.get("hidden_states") if not args else None
        rotation, cache = kwargs.get("position_embeddings"), kwargs.get("past_key_values")
        if (
            hidden is None
            or hidden.numel() != tokens * self._columns
            or hidden.dim() != 3
            or hidden.dtype != self._dtype
            or kwargs.get("attention_mask") is not None
            or not isinstance(cache, Cache)
            or not isinstance(rotation, tuple)
        ):
            return None
        cos, sin = rotation
        numbers = tokens * self._width
        if cos.numel() != numbers or sin.numel() != numbers or cos.dtype != self._dtype:
            return None
        if any(
            value is not None for name, value in kwargs.items() if name not in TRIED and name not in KNOWN_ARGUMENTS
        ):
            return None
        return hidden.contiguous(), cos.contiguous(), sin.contiguous(), cache


TRIED = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}


def fused(module: nn.Module, kernels: NativeKernels) -> FewRowsMlp | OneTokenAttention | None:
    """One call for a whole block, if it does what the block does; else None."""
    return fused_mlp(module, kernels) or fused_attention(module, kernels)


@torch.no_grad()
def fused_mlp(module: Any, kernels: NativeKernels) -> FewRowsMlp | None:
    """For a block of gate, up and down that activates by SiLU."""
    parts: list[Any] = [getattr(module, name, None) for name in MLP_PARTS]
    if not all(is_plain(part, kernels) and part.bias is None for part in parts) or has_more(module, MLP_PARTS):
        return None
    gate, up, down = (part.weight for part in parts)
    if not gate.shape == up.shape == down.shape[::-1]:
        return None
    replacement = FewRowsMlp(module, kernels)
    probe = random_rows(gate.shape[1], gate.dtype)[:, :1]
    try:
        expected = module.forward(probe)
    except Exception:  # it wants more than hidden states: it keeps its own forward
        return None
    return replacement if is_alike(replacement(probe), expected) else None


@torch.no_grad()
def fused_attention(module: Any, kernels: NativeKernels) -> OneTokenAttention | None:
    """For a block of four projections, as they are named in most architectures."""
    parts: list[Any] = [getattr(module, name, None) for name in ATTENTION_PARTS]
    width, layer = getattr(module, "head_dim", None), getattr(module, "layer_idx", None)
    if not all(is_plain(part, kernels) for part in parts) or not isinstance(width, int) or not isinstance(layer, int):
        return None
    if has_more(module, ATTENTION_PARTS + HEAD_NORMS) or takes_more(module):
        return None
    queries, keys, values, output = (part.weight.shape for part in parts)
    if queries[0] % width or keys[0] % width or width % 2 or keys != values or output[1] != queries[0]:
        return None
    if keys[0] == 0 or queries[0] % keys[0]:
        return None
    norms = head_norms(module, width, kernels)
    if norms is None:
        return None
    replacement = OneTokenAttention(module, kernels, norms)
    return replacement if attends_alike(module, replacement, parts[0].weight.dtype) else None


def head_norms(module: Any, width: int, kernels: NativeKernels) -> tuple[SmallNorm, ...] | None:
    """The norms over each head of queries and keys, none where there are none; None where the kernel has no such."""
    modules: list[Any] = [getattr(module, name, None) for name in HEAD_NORMS]
    if modules == [None, None]:
        return ()
    found: list[SmallNorm] = []
    for norm in modules:
        weight = getattr(norm, "weight", None)
        if (
            not isinstance(weight, torch.Tensor)
            or weight.shape != (width,)
            or not kernels.supports(weight.dtype, weight.device)
        ):
            return None
        replacement = small_norm(norm, kernels)
        if replacement is None:
            return None
        found.append(replacement)
    return tuple(found) if found[0].early == found[1].early else None


def attends_alike(module: Any, replacement: OneTokenAttention, dtype: torch.dtype) -> bool:
    """Whether both give the same for some tokens one after the other, and leave the same in their caches.

    The block must attend by the kernel too: it would do so only without masks, sinks and caps, even where they hardly
    show on a few tokens.
    """
    columns, width, layer = module.q_proj.in_features, module.head_dim, module.layer_idx
    mine, theirs = DynamicCache(), DynamicCache()
    hidden = random_rows(columns, dtype) * torch.tensor(SCALES, dtype=dtype)[None, :, None]
    cos, sin = random_rows(width, dtype), random_rows(width, dtype).flip(-1)
    for token in range(len(SCALES)):
        place = slice(token, token + 1)
        given = {"hidden_states": hidden[:, place], "position_embeddings": (cos[:, place], sin[:, place])}
        with listening(module) as calls:
            try:
                expected = module.forward(**given, attention_mask=None, past_key_values=theirs)
            except Exception:  # it wants more than this: it keeps its own forward
                return False
        if calls != [1]:
            return False
        if not isinstance(expected, tuple) or len(expected) != 2 or expected[1] is not None:
            return False
        found = replacement(**given, attention_mask=None, past_key_values=mine)
        if found is None or not is_alike(found[0], expected[0]):
            return False
    held = [(cache.layers[layer].keys, cache.layers[layer].values) for cache in (mine, theirs)]
    return all(is_alike(one, other) for one, other in zip(*held, strict=True))


@contextmanager
def listening(module: Any) -> Iterator[list[int]]:
    """While open, how often the module attends by the kernels it knows: one number, none where it knows none."""
    kernels: NativeKernels | None = getattr(module, "raymoe_kernels", None)
    calls = [] if kernels is None else [0]

    class Listener:
        supports = staticmethod(NativeKernels.supports)

        def attention(self, *args: Any) -> None:
            assert kernels is not None
            calls[0] += 1
            kernels.attention(*args)

    if kernels is not None:
        module.raymoe_kernels = Listener()
    try:
        yield calls
    finally:
        if kernels is not None:
            module.raymoe_kernels = kernels


def has_more(module: nn.Module, parts: tuple[str, ...]) -> bool:
    """Whether a block has parameters besides those of these parts: norms, indexers, gates, sinks."""
    own = {name.partition(".")[0] for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return not own <= set(parts)


def takes_more(module: Any) -> bool:
    """Whether attention reads arguments by name that it is not tried with."""
    named = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    return not set(named) <= TRIED


def is_plain(module: Any, kernels: NativeKernels) -> bool:
    """Whether this is an ordinary linear layer that the kernels can read."""
    if type(module) is not nn.Linear or not module.weight.is_contiguous():
        return False
    return kernels.supports(module.weight.dtype, module.weight.device)


def random_rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, tokens, columns], the same each time."""
    return torch.randn((1, len(SCALES), columns), generator=torch.Generator().manual_seed(columns)).to(dtype)


def is_alike(found: Any, expected: Any) -> bool:
    """Whether two results differ by no more than rounding."""
    if not isinstance(expected, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    scale = expected.float().abs().max().item()
    return torch.allclose(found.float(), expected.float(), rtol=0.0, atol=TOLERANCE[expected.dtype] * (scale or 1.0))
