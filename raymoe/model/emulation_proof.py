"""Which MoE layers a trunk can run ahead from, found out and proven when it is attached.

Three forwards show how decoder layers are called: a prompt with padding, one without, and a single token. A layer can
be run ahead of when it receives the very output of the one before it, and all else that it receives has been given
to an earlier one too, in each of the three; padding gives every kind of attention a mask of its own to tell by.

Then it is tried. With experts that are all known, each run ahead must give the scores that the next router really
comes to; and logits and the caches' sizes must be those of steps that nobody ran ahead of, bit by bit. What fails is
not run ahead from.

T tokens, K experts per token, E experts, H hidden.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.emulation import Arguments, Emulation, LayerTap, Sources, Way
from raymoe.model.router import TOLERANCE, ProbeExperts, backend_of, probe_tokens
from raymoe.model.runner import Runner, SequenceState
from raymoe.model.sites import MoeSite

log = logging.getLogger(__name__)

PADDING = 5  # tokens
PROOF_TOKENS = 24  # of the prompt; and then
PROOF_STEPS = 3


def attach_emulation(model: Any, sites: Sequence[MoeSite]) -> Emulation | None:
    """What runs ahead of a trunk's steps, or None where no layer can be run ahead from."""
    try:
        emulation = Finder(model, sites).emulation()
        if emulation is not None:
            prove(model, sites, emulation)
    except Exception:  # architectures may refuse the probe's inputs in their own ways
        log.info("this architecture can't be run ahead of", exc_info=True)
        return None
    if emulation is None or not any(emulation.ways):
        return None
    log.info("%d of %d layers can be run ahead from", sum(way is not None for way in emulation.ways), len(sites) - 1)
    return emulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """A decoder layer was called."""

    module: nn.Module
    arguments: Arguments
    output: Any


class Finder:
    """Finds the decoder layers and how they follow each other."""

    def __init__(self, model: Any, sites: Sequence[MoeSite]) -> None:
        self._model = model
        self._sites = sites
        self._experts = experts_modules(model)
        self._lists = [layer_path(model, path) for path, _ in self._experts]

    def emulation(self) -> Emulation | None:
        """The emulation, not proven yet; None where the decoder layers are not a single list, called one by one."""
        found = {path for path, _ in filter(None, self._lists)}
        if len(found) != 1:
            return None
        (path,) = found
        layers = list(self._model.get_submodule(path))
        forwards = observe(self._model, layers, [module for _, module in self._experts])
        order = [called.module for called in forwards[0]]
        if len(set(order)) != len(order) or any([called.module for called in calls] != order for calls in forwards):
            return None
        places = [order.index(layers[at[1]]) if at and layers[at[1]] in order else None for at in self._lists]
        taps = [LayerTap(layer, *self._experts_in(place, places)) for place, layer in enumerate(order)]
        ways = [self._way(index, places, forwards) for index in range(len(places))]
        return Emulation(taps, self._sites, ways)

    def _experts_in(self, place: int, places: list[int | None]) -> tuple[nn.Module | None, list[nn.Module]]:
        if places.count(place) != 1:
            return None, []
        path, experts = self._experts[places.index(place)]
        at = self._lists[places.index(place)]
        assert at is not None
        return experts, beside(self._model, f"{at[0]}.{at[1]}", path)

    def _way(self, index: int, places: list[int | None], forwards: list[list[Called]]) -> Way | None:
        start, end = places[index], places[index + 1] if index + 1 < len(places) else None
        if start is None or end is None or end <= start or places.count(start) + places.count(end) != 2:
            return None
        if self._sites[index + 1].router.rule is None:
            return None
        sources = []
        for place in range(start + 1, end + 1):
            found = sources_of(place, start, forwards)
            if found is None or not all(follows(calls[place - 1], calls[place]) for calls in forwards):
                return None
            sources.append(found)
        needed = frozenset(source for positions, names in sources for source in (*positions, *names.values()))
        return Way(start=start, end=end, sources=tuple(sources), needed=needed)


def layer_path(model: nn.Module, path: str) -> tuple[str, int] | None:
    """The outermost list of modules that the module at ``path`` is in, as its path and the place in it."""
    names = path.split(".")
    for end in range(1, len(names)):
        if isinstance(model.get_submodule(".".join(names[:end])), nn.ModuleList):
            return ".".join(names[:end]), int(names[end])
    return None


def beside(model: nn.Module, layer: str, experts: str) -> list[nn.Module]:
    """The outermost modules within a decoder layer that neither are nor hold its experts."""
    found: list[nn.Module] = []

    def descend(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}"
            if experts == inner:
                continue
            if experts.startswith(f"{inner}.") or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                descend(child, inner)  # lists and dicts are not called
            else:
                found.append(child)

    descend(model.get_submodule(layer), layer)
    return found


def observe(model: Any, layers: list[nn.Module], experts: list[Any]) -> list[list[Called]]:
    """How decoder layers are called: with a padded prompt, with a plain one, and with a token after that."""
    calls: list[Called] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Called(module=module, arguments=(args, kwargs), output=output))

    def taken(forward: Callable[[], Any]) -> list[Called]:
        calls.clear()
        forward()
        return list(calls)

    tokens = probe_tokens(model)
    runner = Runner(model)
    with backend_of(experts, ProbeExperts()), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        padded = taken(lambda: padded_prefill(model, tokens))
        states: list[SequenceState] = []
        plain = taken(lambda: states.append(runner.prefill(tokens)[1]))
        single = taken(lambda: runner.decode(states[0], tokens[0]))
    return [padded, plain, single]


@torch.inference_mode()
def padded_prefill(model: Any, tokens: list[int]) -> None:
    """Run a prompt whose first tokens are padding."""
    ids = torch.tensor([tokens], device=model.device)
    mask = torch.ones_like(ids)
    mask[:, :PADDING] = 0
    kwargs: dict[str, Any] = {"use_cache": True}
    if model._supports_default_dynamic_cache():
        kwargs["past_key_values"] = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(**model.prepare_inputs_for_generation(ids, is_first_iteration=True, attention_mask=mask, **kwargs))


def follows(earlier: Called, later: Called) -> bool:
    """Whether a decoder layer received what the one before it returned."""
    output = earlier.output[0] if isinstance(earlier.output, tuple) else earlier.output
    args = later.arguments[0]
    return isinstance(output, torch.Tensor) and bool(args) and args[0] is output


def sources_of(place: int, start: int, forwards: list[list[Called]]) -> Sources | None:
    """For all that a decoder layer is given, the last one up to ``start`` that was given the same in every forward."""

    def values(at: int, key: int | str) -> Iterator[Any]:
        for calls in forwards:
            args, kwargs = calls[at].arguments
            if isinstance(key, int):
                yield args[key] if key < len(args) else Missing
            else:
                yield kwargs.get(key, Missing)

    def source(key: int | str) -> int | None:
        for earlier in range(start, -1, -1):
            if all(map(same, values(place, key), values(earlier, key))):
                return earlier
        return None

    args, kwargs = forwards[0][place].arguments
    for calls in forwards:
        others, named = calls[place].arguments
        if len(others) != len(args) or named.keys() != kwargs.keys():
            return None
    positions = [found for index in range(1, len(args)) if (found := source(index)) is not None]
    names = {name: found for name in kwargs if (found := source(name)) is not None}
    known_all = len(positions) == len(args) - 1 and len(names) == len(kwargs)
    return (tuple(positions), names) if known_all else None


class Missing:
    """In place of an argument that was not given."""


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are one. Tensors must be the same object: masks of two kinds agree on a short prompt."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    simple = isinstance(one, (bool, int, float, str)) and type(one) is type(other)
    return one is other or (simple and one == other)


class ProofExperts:
    """An ``ExpertBackend`` that knows all experts' outputs at once, and notes where a run ahead was wrong.

    Args:
        emulation: None runs nothing ahead.
    """

    def __init__(self, sites: Sequence[MoeSite], emulation: Emulation | None, tolerance: float) -> None:
        self.wrong: set[int] = set()
        self._sites = sites
        self._emulation = emulation
        self._tolerance = tolerance
        self._weights_TK = torch.empty(0)
        self._expected_TE: dict[int, np.ndarray] = {}

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's own choice; compares its scores with those foretold."""
        self._weights_TK = weights_TK
        expected_TE = self._expected_TE.pop(layer, None)
        if expected_TE is not None:
            router = self._sites[layer].router
            scores_TE = router.scores_of(router.logits_TE)
            if not np.allclose(expected_TE, scores_TE, rtol=self._tolerance, atol=1e-6):
                self.wrong.add(layer - 1)
        return experts_TK, weights_TK

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Something [T, K, H] that depends on token and expert."""
        parts_TK = 0.25 + 0.125 * (experts_TK % 7)
        output_TKH = (hidden_TH.unsqueeze(1) * parts_TK.unsqueeze(-1)).to(hidden_TH.dtype)
        if self._emulation is not None and self._emulation.ways[layer] is not None:
            routed_TH = (output_TKH * self._weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden_TH.dtype)
            expected_TE = self._emulation.scores_after(layer, routed_TH)
            if expected_TE is None:
                self.wrong.add(layer)
            else:
                self._expected_TE[layer + 1] = expected_TE
        return output_TKH


def prove(model: Any, sites: Sequence[MoeSite], emulation: Emulation) -> None:
    """Take the ways out of an emulation that lead elsewhere, or all where steps are not left as they were."""
    plain = ProofExperts(sites, None, 0.0)
    ahead = ProofExperts(sites, emulation, TOLERANCE[model.dtype])
    expected = outcome(model, plain)
    emulation.install()
    try:
        found = outcome(model, ahead)
    finally:
        emulation.remove()
    for layer in ahead.wrong:
        emulation.ways[layer] = None
    same_sizes = [size for _, size in found] == [size for _, size in expected]
    if not same_sizes or not all(torch.equal(one, other) for (one, _), (other, _) in zip(found, expected, strict=True)):
        emulation.ways[:] = [None] * len(emulation.ways)


def outcome(model: Any, backend: ProofExperts) -> list[tuple[torch.Tensor, int]]:
    """Logits, and bytes in the caches, after a prompt and each of a few tokens."""
    tokens = probe_tokens(model)
    runner = Runner(model)
    with backend_of([module for _, module in experts_modules(model)], backend):
        logits, state = runner.prefill(tokens[:PROOF_TOKENS])
        results = [(logits, Runner.cache_bytes(state))]
        for token in tokens[PROOF_TOKENS : PROOF_TOKENS + PROOF_STEPS]:
            logits = runner.decode(state, token)
            results.append((logits, Runner.cache_bytes(state)))
    return results
