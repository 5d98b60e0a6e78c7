"""The first moments of a turn, in C++: what Python would decide, answered and begun."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.device.played import share
from raymoe.engine.dialogue import Dialogue, Words
from raymoe.experts.slots import ABSENT, UNDER_WAY
from raymoe.kernels.turns import NativeTurns, PlainRule, TurnMemory, native_turns
from raymoe.model.router_rule import RouterRule
from raymoe.placement.routing import route

COPY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)
STREAM, BYTES, PATIENCE_NS = 77, 1000, 1000
NO_RULE = PlainRule(alpha=0.0, score="softmax", renormalised=False, scale=1.0)


class Layers:
    """Layers of a step, whose experts e lie at 100 + e, and whose slots s at 900 + s."""

    def __init__(self, layers: int, experts: int, top_k: int, slots: int) -> None:
        self.experts, self.top_k = experts, top_k
        self.slot_of_LE = np.full((layers, experts), ABSENT, dtype=np.int32)
        self.ready_S, self.shielded_S = np.zeros(slots, dtype=bool), np.zeros(slots, dtype=bool)
        self.layer_S = np.zeros(slots, dtype=np.int64)
        self.ranked_LR = np.full((layers, slots + 1), -1, dtype=np.int32)
        self.source_E = np.arange(100, 100 + experts, dtype=np.uint64)
        self.target_S = np.arange(900, 900 + slots, dtype=np.uint64)
        self.talks = [Dialogue(share, Words(top_k, experts)) for _ in range(layers)]
        self.copied: list[tuple[int, int, int, int]] = []
        self.refuses = False
        self._copy: Any = COPY(self._note)
        native = native_turns([TurnMemory(**talk.memory(), **self._memory(n)) for n, talk in enumerate(self.talks)])
        if native is None:
            pytest.skip("there is no C++ compiler")
        self.native: NativeTurns = native

    def _memory(self, layer: int) -> dict[str, int]:
        return {
            "slot_of": self.slot_of_LE[layer].ctypes.data,
            "ready": self.ready_S.ctypes.data,
            "shielded": self.shielded_S.ctypes.data,
            "slots": len(self.ready_S),
            "layer_of": self.layer_S.ctypes.data,
            "layer": layer,
            "source": self.source_E.ctypes.data,
            "target": self.target_S.ctypes.data,
            "bytes": BYTES,
            "ranked": self.ranked_LR[layer].ctypes.data,
            "experts": self.experts,
        }

    def _note(self, target: int, source: int, nbytes: int, stream: int) -> int:
        if not self.refuses:
            self.copied.append((target, source, nbytes, stream))
        return int(self.refuses)

    def hold(self, layer: int, experts: list[int], first_slot: int = 0) -> None:
        """These experts are in slots, one behind the other."""
        for slot, expert in enumerate(experts, first_slot):
            self.slot_of_LE[layer, expert] = slot
            self.ready_S[slot], self.layer_S[slot] = True, layer

    def tell(self, layer: int, experts: list[int], weights: list[float], logits: np.ndarray | None = None) -> None:
        told = self.talks[layer].told
        told[: self.top_k], told[self.top_k : 2 * self.top_k] = experts, weights
        told[2 * self.top_k :] = 0.0 if logits is None else logits

    def run(self, first: int = 0, rule: PlainRule | None = NO_RULE, factor: float = 0.0, most: int = 8) -> Any:
        copy = ctypes.cast(self._copy, ctypes.c_void_p).value or 0, STREAM
        return self.native.run(first, 1, rule, factor, most, PATIENCE_NS, copy)

    def answer(self, layer: int) -> tuple[list[int], list[float]] | None:
        """Slots and weights that the device was told in turn 1; None where it waits."""
        words = self.talks[layer].decided.numpy()
        if (words >> 32).min() < 1:
            return None
        values = words.astype(np.int32)
        return values[: self.top_k].tolist(), values[self.top_k :].view(np.float32).tolist()


def test_rows_that_are_all_there_are_answered_as_far_as_the_device_has_come() -> None:
    layers = Layers(layers=3, experts=6, top_k=2, slots=6)
    for layer in range(3):
        layers.hold(layer, [2, 4], first_slot=2 * layer)
    layers.tell(0, [4, 2], [0.75, 0.25])
    layers.tell(1, [2, 4], [0.5, 0.5])
    passed = layers.run()
    assert (passed.layer, passed.is_missing, passed.begun) == (2, False, [])
    assert layers.answer(0) == ([1, 0], [0.75, 0.25]) and layers.answer(1) == ([2, 3], [0.5, 0.5])
    assert layers.answer(2) is None
    assert layers.shielded_S.tolist() == [False, False, True, True, False, False], "of the last row alone"
    layers.tell(2, [2, 4], [0.5, 0.5])
    assert layers.run(first=2).layer == 3


def test_missing_experts_are_loaded_into_the_first_slots_that_may_be_emptied() -> None:
    layers = Layers(layers=2, experts=8, top_k=4, slots=6)
    layers.hold(0, [7], first_slot=0)
    layers.hold(1, [0, 1, 2, 3, 4], first_slot=1)
    layers.ranked_LR[1, :6] = [0, 3, 1, 4, 2, 5]  # 0 is another layer's, 3 holds an expert of the row
    layers.ready_S[1] = False  # a load is under way into it
    layers.slot_of_LE[1, 0] = UNDER_WAY
    layers.tell(1, [6, 2, 0, 5], [0.4, 0.3, 0.2, 0.1])
    passed = layers.run(first=1)
    assert (passed.layer, passed.is_missing, passed.begun) == (1, True, [(5, 4), (6, 2)])
    assert layers.copied == [(904, 105, BYTES, STREAM), (902, 106, BYTES, STREAM)]
    assert layers.answer(1) is None
    assert layers.shielded_S.tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("spoil", "begun"),
    [
        (lambda layers: layers.ranked_LR.fill(-1), []),
        (lambda layers: layers.source_E.fill(0), []),
        (lambda layers: setattr(layers, "refuses", True), []),
        (lambda layers: None, [3]),
    ],
    ids=["no slot is known", "not in pinned memory", "the driver refuses", "as it should be"],
)
def test_what_cannot_be_begun_is_left(spoil: Callable[[Layers], None], begun: list[int]) -> None:
    layers = Layers(layers=1, experts=4, top_k=1, slots=1)
    layers.hold(0, [0])
    layers.ranked_LR[0, 0] = 0
    layers.tell(0, [3], [1.0])
    spoil(layers)
    passed = layers.run()
    assert passed.is_missing and [expert for expert, _ in passed.begun] == begun


def test_without_a_rule_only_what_is_surely_needed_is_begun() -> None:
    layers = Layers(layers=1, experts=8, top_k=3, slots=4)
    layers.hold(0, [0, 1, 2, 3])
    layers.ranked_LR[0, :4] = [0, 1, 2, 3]
    layers.tell(0, [5, 6, 7], [0.5, 0.3, 0.2])
    assert [expert for expert, _ in layers.run(rule=None, factor=1.25).begun] == [5, 6]
    assert layers.run(rule=None, factor=float("inf")).begun == []
    layers.shielded_S[:] = False
    assert [expert for expert, _ in layers.run(rule=None, factor=0.0, most=1).begun] == [5]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    alpha=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    score=st.sampled_from(["softmax", "sigmoid"]),
    renormalised=st.booleans(),
)
def test_rows_are_decided_as_the_rule_decides_them(seed: int, alpha: float, score: str, renormalised: bool) -> None:
    random, experts, top_k = np.random.default_rng(seed), 12, 4
    rule = RouterRule(score=score, renormalised=renormalised, scale=1.5)
    logits_E = random.standard_normal(experts).astype(np.float32)
    scores_E = rule.scores(logits_E[None])[0]
    chosen_K = np.argsort(-scores_E, kind="stable")[:top_k].astype(np.int32)
    held = random.permutation(experts)[: random.integers(0, experts + 1)].tolist()
    available_E = np.isin(np.arange(experts), held)
    expected = route(scores_E[None], chosen_K[None], available_E, alpha)

    layers = Layers(layers=1, experts=experts, top_k=top_k, slots=experts)
    layers.hold(0, held)
    weights_K = rule.weights(scores_E[None, chosen_K])[0]
    layers.tell(0, chosen_K.tolist(), weights_K.tolist(), logits_E)
    plain = PlainRule(alpha=alpha, score=score, renormalised=renormalised, scale=1.5)
    passed = layers.run(rule=plain)
    final_K = expected.experts_TK[0]
    assert layers.native.chosen_LK[0].tolist() == final_K.tolist()
    assert layers.native.replaced_L[0] == np.count_nonzero(expected.replaced_TK)
    assert passed.is_missing == (not available_E[final_K].all())
    if not passed.is_missing:
        slots, weights = layers.answer(0) or ([], [])
        assert slots == [held.index(expert) for expert in final_K.tolist()]
        np.testing.assert_allclose(weights, rule.weights(scores_E[None, final_K])[0], rtol=1e-5)
