"""Sequences of any lengths as the rows of one forward, of one token each, or of several where kernels attend.

What looks at one position alone (norms, MLPs, routers, experts, the head) runs once for all rows. What looks back
(attention, state spaces) runs row by row, each on its own cache, as if it were alone: so nothing is padded, no cache is
copied, and rows come and go at any step. Where native kernels attend, a call of theirs does it for all rows, and a row
may have several tokens: a piece of a prompt. Whether an architecture bears that is proved before it is relied on.

B rows.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "past_key_value")
MASK_ARGUMENT = "attention_mask"


class RowCaches(DynamicCache):
    """The caches of all rows. To the model it looks like that of the longest row; ``ByRow`` takes it apart.

    Masks are made for the longest row. Those of the others are the last columns of it, for what a row may look back on
    depends on distances alone.

    Attributes:
        rows: each row's cache.
        counts: tokens that each reads; the model sees [their sum, 1] tokens, those of a row one after the other.
    """

    def __init__(self, caches: Sequence[Cache], counts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.rows = list(caches)
        self.counts = [1] * len(caches) if counts is None else list(counts)
        longest = max(caches, key=lambda cache: cache.get_seq_length())
        self.layers = longest.layers
        self.layer_class_to_replicate = longest.layer_class_to_replicate


class ByRow:
    """Replaces the forward of a module that takes a cache: row by row where it is that of several rows.

    A forward that has a ``together`` of its own (``OneTokenAttention``) does all rows at once where it can.
    """

    def __init__(self, module: Any) -> None:
        self.own_forward: Callable[..., Any] = module.forward
        self._together: Callable[..., Any] | None = getattr(module.forward, "together", None)
        self._layer: int = getattr(module, "layer_idx", 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for these arguments."""
        caches = next((value for value in (*args, *kwargs.values()) if isinstance(value, RowCaches)), None)
        if caches is None:
            return self.own_forward(*args, **kwargs)
        if self._together is not None:
            done = self._together(caches.counts, caches.rows, args, {**kwargs, **self._one_cache(caches, kwargs)})
            if done is not None:
                return done
        if max(caches.counts) > 1:
            raise NotImplementedError("rows of several tokens, where no kernel attends")
        rows = len(caches.rows)
        found = []
        for row, cache in enumerate(caches.rows):
            its_args = [of_row(value, row, cache, rows) for value in args]
            its_kwargs = {name: of_row(value, row, cache, rows) for name, value in kwargs.items()}
            mask = its_kwargs.get(MASK_ARGUMENT)
            if isinstance(mask, torch.Tensor):
                its_kwargs[MASK_ARGUMENT] = mask[..., -cache.get_mask_sizes(1, self._layer)[0] :]
            found.append(self.own_forward(*its_args, **its_kwargs))
        return together(found)

    @staticmethod
    def _one_cache(caches: RowCaches, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments that are the caches, as any one of them: what takes all rows has them apart."""
        return {name: caches.rows[0] for name, value in kwargs.items() if value is caches}


class EachRow(list[Any]):
    """Results of rows that are no one tensor, being as long as the rows' past is; a later layer may ask for them."""


def of_row(value: Any, row: int, cache: Cache, rows: int) -> Any:
    """A row's part of an argument."""
    if isinstance(value, RowCaches):
        return cache
    if isinstance(value, EachRow):
        return value[row]
    if isinstance(value, torch.Tensor):
        return value[row : row + 1] if value.dim() and value.shape[0] == rows else value
    if isinstance(value, tuple):
        return tuple(of_row(part, row, cache, rows) for part in value)
    return value


def together(found: list[Any]) -> Any:
    """The rows' results as that of all rows."""
    first = found[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(found) if all(other.shape == first.shape for other in found) else EachRow(found)
    if isinstance(first, tuple):
        return tuple(together(list(parts)) for parts in zip(*found, strict=True))
    return first


def split_by_rows(model: PreTrainedModel) -> list[Any]:
    """Let every module that looks back take rows. Returns these modules."""
    modules = lookers_back(model)
    for module in modules:
        module.forward = ByRow(module)
    return modules


def give_back(modules: list[Any]) -> None:
    """Undo ``split_by_rows``."""
    for module in modules:
        module.forward = module.forward.own_forward


def lookers_back(model: nn.Module) -> list[Any]:
    """Within each decoder layer, the outermost modules that are given a cache."""
    stacks = [stack for stack in model.modules() if isinstance(stack, nn.ModuleList)]
    found: list[Any] = []
    for layer in [layer for stack in stacks for layer in stack if takes_cache(layer)]:
        waiting = list(layer.children())
        while waiting:
            module = waiting.pop()
            if takes_cache(module):
                found.append(module)
            else:
                waiting.extend(module.children())
    return found


def takes_cache(module: nn.Module) -> bool:
    """Whether a module's forward names a cache among its arguments."""
    return any(name in inspect.signature(type(module).forward).parameters for name in CACHE_ARGUMENTS)
