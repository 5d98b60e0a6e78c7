"""Run ahead of the step under way: the MoE layer in hand to its end, and on to the next one's router.

While a layer's routed experts are on their way, all else that it needs is known. Its decoder layer is run once more,
with the modules that it has already called giving what they gave, and its experts giving what is known of them. What
comes out goes through the decoder layers that follow, up to the norm before the next router, on copies of the caches.

Nothing here names an architecture: what a decoder layer does between its modules is its own code, run again.
Which layers it holds for is found out, and proven, by ``emulation_proof``.

T tokens, E experts, H hidden.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from raymoe.model.rows import RowCaches
from raymoe.model.sites import MoeSite

log = logging.getLogger(__name__)

MOST_ROWS = 64  # tokens of a step that is recorded: nobody forecasts longer prompts, and they would hold memory

Forward = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Sources = tuple[tuple[int, ...], dict[str, int]]


class Mode(Enum):
    """What a decoder layer's modules do when they are called."""

    IDLE = auto()
    RECORD = auto()
    REPLAY = auto()


class Tap(ABC):
    """Stands in for a module's own forward while installed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own_forward: Forward = module.forward
        self._was_replaced = "forward" in vars(module)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.forward = self

    def remove(self) -> None:
        """Give it back."""
        if self._was_replaced:
            self.module.forward = self.own_forward
        else:
            vars(self.module).pop("forward", None)


class ModuleTap(Tap):
    """Of a module in a decoder layer. A replay repeats its outputs; calls not made so far are made in earnest."""

    def __init__(self, module: nn.Module, layer: "LayerTap") -> None:
        super().__init__(module)
        self.outputs: list[Any] = []
        self.repeated = 0
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = self._layer.mode
        if mode is Mode.REPLAY and self.repeated < len(self.outputs):
            self.repeated += 1
            return self.outputs[self.repeated - 1]
        output = self.own_forward(*args, **kwargs)
        if mode is Mode.RECORD:
            self.outputs.append(output)
        return output


class ExpertsTap(Tap):
    """Of a decoder layer's experts module. A replay has its output from elsewhere."""

    def __init__(self, module: nn.Module, layer: "LayerTap") -> None:
        super().__init__(module)
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer.routed_TH if self._layer.mode is Mode.REPLAY else self.own_forward(*args, **kwargs)


class LayerTap(Tap):
    """Of a decoder layer; knows what the step under way gave it.

    Attributes:
        arguments: what it was called with in the step under way; None before and after.
        routed_TH: what its experts give in a replay.
        step: the taps of all decoder layers, in the order of calling.

    Args:
        experts: its experts module, None where it has none.
        beside: the modules that it calls, but for those that hold its experts.
    """

    def __init__(self, module: nn.Module, experts: nn.Module | None, beside: Sequence[nn.Module]) -> None:
        super().__init__(module)
        self.mode = Mode.IDLE
        self.arguments: Arguments | None = None
        self.routed_TH: torch.Tensor | None = None
        self.step: Sequence[LayerTap] = (self,)
        self._recorded = [ModuleTap(other, self) for other in beside] if experts is not None else []
        self._within: list[Tap] = [*self._recorded, *([ExpertsTap(experts, self)] if experts is not None else [])]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], torch.Tensor) or args[0].shape[:2].numel() > MOST_ROWS:
            self.arguments = None
            return self.own_forward(*args, **kwargs)
        self.arguments = (args, kwargs)
        self.mode = Mode.RECORD if self._recorded else Mode.IDLE
        goes_on = False
        try:
            output = self.own_forward(*args, **kwargs)
            goes_on = self is not self.step[-1]
            return output
        finally:
            self.mode = Mode.IDLE
            for tap in self._recorded:
                tap.outputs.clear()
            if goes_on:
                self.arguments = ((None, *args[1:]), kwargs)  # later layers may need all but the hidden states
            else:
                for layer in self.step:  # nothing keeps a finished request's cache
                    layer.arguments = None

    def replay(self, routed_TH: torch.Tensor, arguments: Arguments) -> Any:
        """What the layer returns if its routed experts give ``routed_TH``. For the layer being computed only."""
        assert self.mode is Mode.RECORD
        for tap in self._recorded:
            tap.repeated = 0
        self.routed_TH, self.mode = routed_TH, Mode.REPLAY
        try:
            return self.own_forward(*arguments[0], **arguments[1])
        finally:
            self.routed_TH, self.mode = None, Mode.RECORD

    def install(self) -> None:
        """Take the place of the layer's forward, and of those within."""
        super().install()
        for tap in self._within:
            tap.install()

    def remove(self) -> None:
        """Give them back."""
        super().remove()
        for tap in self._within:
            tap.remove()


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From one MoE layer to the next.

    Attributes:
        start, end: their decoder layers' places in the order of calling.
        needed: all the earlier ones that ``sources`` name.
        sources: for each decoder layer after ``start``, which earlier one was called with the same value: by
            position, from the second on, and by name. The first are the hidden states.
    """

    start: int
    end: int
    sources: tuple[Sources, ...]
    needed: frozenset[int]


class Emulation:
    """Runs ahead of steps. Used by the thread that runs the trunk.

    What it needs of a step is recorded from the first question on; until then it costs nothing.

    Args:
        taps: of the decoder layers, in the order of calling.
        sites: of the MoE layers.
        ways: from each MoE layer to the next; None where it can't run ahead.
    """

    def __init__(self, taps: list[LayerTap], sites: Sequence[MoeSite], ways: list[Way | None]) -> None:
        self._taps = taps
        self._sites = sites
        self.ways = ways
        self._installed = False
        for tap in taps:
            tap.step = taps

    def install(self) -> None:
        """Record steps from the next decoder layer on."""
        self._installed = True
        for tap in self._taps:
            tap.install()

    def remove(self) -> None:
        """Leave the model as it was."""
        self._installed = False
        for tap in self._taps:
            tap.remove()

    def scores_after(self, layer: int, routed_TH: torch.Tensor) -> np.ndarray | None:
        """Gate scores [T, E] of MoE layer ``layer + 1`` if the routed experts of ``layer`` gave ``routed_TH``.

        To be asked while the experts of ``layer`` are computed. The step under way does not notice: neither caches
        nor what sites and routers know of it change. None where it can't be told.
        """
        way = self.ways[layer] if layer < len(self.ways) else None
        if way is None:
            return None
        if not self._installed:
            self.install()
        taps = self._taps
        if taps[way.start].mode is not Mode.RECORD or any(taps[place].arguments is None for place in way.needed):
            return None
        try:
            return self._scores_after(layer, way, routed_TH)
        except Exception:  # another architecture's code, run where it isn't meant to: a guess must not fail a request
            log.warning("layer %d can't be run ahead of any more; its gate alone forecasts", layer + 1, exc_info=True)
            self.ways[layer] = None
            return None

    def _scores_after(self, layer: int, way: Way, routed_TH: torch.Tensor) -> np.ndarray | None:
        here, there = self._sites[layer], self._sites[layer + 1]
        with here.unchanged():
            state_TH = there.state_at_arrival(lambda: self._run(way, routed_TH))
        return None if state_TH is None else there.gate_scores(state_TH)

    def _run(self, way: Way, routed_TH: torch.Tensor) -> None:
        copies = CacheCopies(way)
        given = {place: copies.within(self._taps[place].arguments) for place in {way.start, *way.needed}}
        output = self._taps[way.start].replay(routed_TH, given[way.start])
        for place, (positions, names) in enumerate(way.sources, start=way.start + 1):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            others = [given[source][0][index] for index, source in enumerate(positions, start=1)]
            named = {name: given[source][1][name] for name, source in names.items()}
            output = self._taps[place].own_forward(hidden, *others, **named)


class CacheCopies:
    """Copies of the caches that decoder layers are given, for one run ahead.

    Tensors that a cache holds as attributes are shared with the copy, since updates assign new ones, or write behind
    what is in use (``RoomyLayer``), where the step itself will write when it comes there. Those it holds in a dict or
    list may be written in place, so they are copied. Only the layers on the way are.
    """

    def __init__(self, way: Way) -> None:
        self._places = range(way.start, way.end + 1)
        self._copies: dict[int, Any] = {}

    def within(self, arguments: Arguments | None) -> Arguments:
        """The arguments with copies in place of caches."""
        assert arguments is not None, "a decoder layer that has been called in the step under way"
        args, kwargs = arguments
        return tuple(map(self.of, args)), {name: self.of(value) for name, value in kwargs.items()}

    def of(self, value: Any) -> Any:
        """The copy of a cache, the same each time; any other value itself."""
        if not isinstance(value, Cache):
            return value
        if isinstance(value, RowCaches):
            return RowCaches([self.of(cache) for cache in value.rows], value.counts)
        copied = self._copies.get(id(value))
        if copied is None:
            copied = self._copies[id(value)] = shallow(value)
            for place in self._places:
                if place < len(copied.layers):
                    copied.layers[place] = detached(copied.layers[place])
        return copied


def shallow(value: Any) -> Any:
    """Another object of the same class with the same attributes, and dicts and lists of its own."""
    copied = object.__new__(type(value))
    for name, item in vars(value).items():
        vars(copied)[name] = item.copy() if isinstance(item, (dict, list)) else item
    return copied


def detached(layer: Any) -> Any:
    """A copy of a cache's layer that can be updated without changing the layer."""
    copied = shallow(layer)
    for item in vars(copied).values():
        if isinstance(item, (dict, list)):
            for key in item if isinstance(item, dict) else range(len(item)):
                if isinstance(item[key], torch.Tensor):
                    item[key] = item[key].clone()
    return copied
