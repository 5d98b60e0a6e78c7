"""Replays of exact routing: eviction rules side by side, and what a schedule would give if deciding cost nothing.

Without substitution hidden states do not depend on what is resident, so that a recorded trace is the truth for every
eviction rule, the clairvoyant one included. With substitution it is not; there only the real model tells.

T tokens, L layers, E experts, K chosen experts, C slots per layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raymoe.placement.eviction import clairvoyant_victim, lowest_value
from raymoe.placement.host_assist import fastest_split
from raymoe.placement.keeping import Keeper
from raymoe.placement.prefetch import lookahead, wanted
from raymoe.placement.routing import route


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Routing of one text, exactly decoded.

    Attributes:
        scores_TLE: gate scores.
        chosen_TLK: the router's choice.
        ahead_TLAE: gate scores of layer l + 1 + a by that layer's gate on the state at layer l.
    """

    scores_TLE: np.ndarray
    chosen_TLK: np.ndarray
    ahead_TLAE: np.ndarray


def hits(trace: Trace, slots: int, rule: str, window: int) -> tuple[int, int]:
    """(hits, pairs) of one eviction rule: "lru", "lfu", "score", or "clairvoyant"."""
    tokens, layers, experts = trace.scores_TLE.shape
    keeper = Keeper(rule if rule != "clairvoyant" else "lru", layers, experts, window)
    found = 0
    for layer in range(layers):
        next_use_TE = next_uses(trace.chosen_TLK[:, layer], experts)
        held = np.full(slots, -1)
        last_use = np.zeros(slots, dtype=np.int64)
        for token in range(tokens):
            chosen = trace.chosen_TLK[token, layer]
            keeper.step(layer, trace.scores_TLE[token, layer], chosen, 1)
            here = np.isin(chosen, held)
            found += int(here.sum())
            shielded = np.isin(held, chosen)
            last_use[shielded] = token + 1
            for expert in chosen[~here]:
                slot = int(np.argmax(held < 0)) if (held < 0).any() else None
                if slot is None and rule == "clairvoyant":
                    slot = clairvoyant_victim(next_use_TE[token, held], ~shielded)
                elif slot is None:
                    values = keeper.values(layer * experts + held, last_use)
                    slot = lowest_value(values, ~shielded)
                if slot is not None:
                    held[slot], last_use[slot], shielded[slot] = expert, token + 1, True
    return found, trace.chosen_TLK.size


def next_uses(chosen_TK: np.ndarray, experts: int) -> np.ndarray:
    """For every token and expert, the next later token that uses it; inf where none does."""
    next_TE = np.full((len(chosen_TK), experts), np.inf)
    coming = np.full(experts, np.inf)
    for token in range(len(chosen_TK) - 1, -1, -1):
        next_TE[token] = coming
        coming[chosen_TK[token]] = token
    return next_TE


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds: of a layer until its router, of computing its experts, of a load, of an expert on the host."""

    until_router_s: float
    experts_s: float
    load_s: float
    host_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay found."""

    layer_s: float
    hit_rate: float


def without_overheads(
    trace: Trace, slots: int, times: Times, *, eviction: str, window: int, alpha: float, prefetch: bool, assist: bool
) -> Replayed:
    """A whole schedule in imagined time, on recorded scores: the bound that its decisions set if they cost nothing.

    One link moves one load at a time; a prefetch begins when the link is free, on-demand loads go first, and
    everything else is free. Substitution acts on exact scores here, which flatters it a little.
    """
    _, layers, experts = trace.scores_TLE.shape
    world = _World(trace, slots, times, Keeper(eviction, layers, experts, window))
    for token in range(len(trace.scores_TLE)):
        for layer in range(world.layers):
            world.layer(token, layer, alpha, prefetch=prefetch, assist=assist)
    steps = trace.scores_TLE.shape[0] * world.layers
    return Replayed(layer_s=world.now_s / steps, hit_rate=world.found / (steps * trace.chosen_TLK.shape[2]))


class _World:
    """Slots, link and clock of one replay."""

    def __init__(self, trace: Trace, slots: int, times: Times, keeper: Keeper) -> None:
        self.trace, self.times, self.keeper = trace, times, keeper
        _, self.layers, self.experts = trace.scores_TLE.shape
        self.now_s = self.link_free_s = self.idle_since_s = 0.0
        self.found = 0
        self.held_LC = np.full((self.layers, slots), -1)
        self.ready_at_LC = np.zeros((self.layers, slots))
        self.last_use_LC = np.zeros((self.layers, slots), dtype=np.int64)
        self.orders: dict[int, dict[int, float]] = {}
        self.clock = 0

    def layer(self, token: int, layer: int, alpha: float, *, prefetch: bool, assist: bool) -> None:
        """One layer of one token."""
        self.now_s += self.times.until_router_s
        self._prefetch_until(self.now_s)
        self.orders.pop(layer, None)
        scores_E = self.trace.scores_TLE[token, layer]
        held_C, ready_C = self.held_LC[layer], self.ready_at_LC[layer] <= self.now_s
        available_E = np.zeros(self.experts, dtype=bool)
        available_E[held_C[ready_C & (held_C >= 0)]] = True
        chosen = route(scores_E[None], self.trace.chosen_TLK[token, layer][None], available_E, alpha).experts_TK[0]
        self.keeper.step(layer, scores_E, chosen, 1)
        self.clock += 1
        self.last_use_LC[layer][np.isin(held_C, chosen)] = self.clock
        missing = chosen[~available_E[chosen]]
        self.found += len(chosen) - len(missing)
        done_s = self.now_s + self.times.experts_s
        hosted: list[int] = []
        if len(missing):
            finish_s, hosted = self._fetch(layer, missing, chosen, scores_E[missing], assist)
            done_s = max(done_s, finish_s + self.times.experts_s / len(chosen))
        self.idle_since_s = self.now_s
        if prefetch:
            self._forecast(token, layer)
        if hosted:
            self.orders[layer] = {expert: self.keeper.worth(layer, expert) for expert in hosted}
        self.now_s = done_s

    def _fetch(
        self, layer: int, missing: np.ndarray, chosen: np.ndarray, scores: np.ndarray, assist: bool
    ) -> tuple[float, list[int]]:
        """Load, wait or compute on the host; (when all are there, experts that the host computed)."""
        slot_of = {int(expert): slot for slot, expert in enumerate(self.held_LC[layer])}
        remaining = np.array(
            [
                max(0.0, self.ready_at_LC[layer, slot_of[int(expert)]] - self.now_s)
                if int(expert) in slot_of
                else np.nan
                for expert in missing
            ]
        )
        flying = ~np.isnan(remaining)
        split = fastest_split(
            scores,
            self.times.load_s,
            self.times.host_s if assist else None,
            link_busy_s=float(np.nanmax(remaining)) if flying.any() else 0.0,
            remaining_s=remaining if flying.any() else None,
        )
        finish_s = self.now_s + len(split.host) * self.times.host_s
        for index in range(len(missing)):
            if flying[index] and index not in split.host:
                finish_s = max(finish_s, self.now_s + remaining[index])
        for index in split.load:
            finish_s = max(finish_s, self._load(layer, int(missing[index]), chosen, self.now_s))
        return finish_s, [int(missing[index]) for index in split.host]

    def _load(self, layer: int, expert: int, chosen: np.ndarray, asked_s: float, worth: float | None = None) -> float:
        """Begin a load; when it will be there, or inf where its victim is worth more than ``worth``."""
        held_C = self.held_LC[layer]
        slot = int(np.argmax(held_C < 0)) if (held_C < 0).any() else None
        if slot is None:
            evictable = ~np.isin(held_C, chosen) & (self.ready_at_LC[layer] <= asked_s)
            values = self.keeper.values(layer * self.experts + held_C, self.last_use_LC[layer])
            slot = lowest_value(values, evictable)
            if slot is None or (worth is not None and worth <= self.keeper.worth(layer, int(held_C[slot]))):
                return np.inf if worth is not None else asked_s + self.times.load_s
        self.link_free_s = max(asked_s, self.link_free_s) + self.times.load_s
        held_C[slot], self.ready_at_LC[layer, slot] = expert, self.link_free_s
        self.last_use_LC[layer, slot] = self.clock
        return self.link_free_s

    def _prefetch_until(self, now_s: float) -> None:
        """The link works through orders, best first, until ``now_s``."""
        while self.orders and max(self.link_free_s, self.idle_since_s) < now_s:
            worth, layer, expert = max(
                (worth, -layer, -expert) for layer, order in self.orders.items() for expert, worth in order.items()
            )
            layer, expert = -layer, -expert
            del self.orders[layer][expert]
            if not self.orders[layer]:
                del self.orders[layer]
            if expert not in self.held_LC[layer]:
                self._load(layer, expert, np.empty(0, dtype=int), max(self.link_free_s, self.idle_since_s), worth)

    def _forecast(self, token: int, layer: int) -> None:
        layer_s = self.now_s / max(1, self.clock)
        farthest = min(lookahead(self.times.load_s, layer_s), self.trace.ahead_TLAE.shape[2])
        for ahead in range(1 if layer == 0 else farthest, farthest + 1):
            target = layer + ahead
            if target < self.layers:
                scores_1E = self.trace.ahead_TLAE[token, layer, ahead - 1][None]
                experts, worth = wanted(scores_1E, scores_1E, self.trace.chosen_TLK.shape[2])
                self.keeper.expect(target, experts, worth)
                self.orders[target] = dict(zip(experts.tolist(), worth.tolist(), strict=True))


def mean_hit_rate(traces: list[Trace], count: Callable[[Trace], tuple[int, int]]) -> float:
    """Over all traces together."""
    found, pairs = map(sum, zip(*(count(trace) for trace in traces), strict=True))
    return found / pairs
