"""The first microseconds of a turn, in C++ (``turns.cpp``): rows that are all there are answered, surely needed loads
are begun. Where there is no compiler ``engine.turns`` does the same in Python.

L layers.
"""

import ctypes
from dataclasses import astuple, dataclass

import numpy as np

from raymoe.kernels.building import native_library

MOST_EXPERTS, MOST_OF_LAYER = 64, 1024  # of a token, and of a layer, as turns.cpp has it


@dataclass(frozen=True, slots=True)
class TurnMemory:
    """Where one layer's turn finds what it needs: addresses and sizes, in the order of turns.cpp's ``Turn``."""

    told: int
    words: int
    decided: int
    k: int
    slot_of: int
    ready: int
    shielded: int
    slots: int
    layer_of: int
    layer: int
    source: int
    target: int
    bytes: int
    ranked: int
    experts: int


@dataclass(frozen=True, slots=True)
class PlainRule:
    """Substitution that C++ decides: ``placement.routing.route`` for one token, ranked by score.

    Attributes:
        alpha: 0 replaces nothing.
        score: "softmax" or "sigmoid"; renormalised, scale: as in ``RouterRule``.
    """

    alpha: float
    score: str
    renormalised: bool
    scale: float


@dataclass(frozen=True, slots=True)
class Passed:
    """How far a run came.

    Attributes:
        layer: the first one that was not answered.
        is_missing: whether experts of its row are in no slot; else the device has not come to it, or it is the end.
        begun: loads that were begun for it: (expert, slot).
    """

    layer: int
    is_missing: bool
    begun: list[tuple[int, int]]


class NativeTurns:
    """Runs over all layers of a step.

    Args:
        memories: one per layer. Whoever names an address keeps the memory behind it.

    Attributes:
        chosen_LK, weights_LK, replaced_L: each layer's row as it was decided last; of K only a layer's own count.
    """

    def __init__(self, library: ctypes.CDLL, memories: list[TurnMemory]) -> None:
        layers, most = len(memories), max(memory.k for memory in memories)
        self.chosen_LK = np.zeros((layers, most), dtype=np.int32)
        self.weights_LK = np.zeros((layers, most), dtype=np.float32)
        self.replaced_L = np.zeros(layers, dtype=np.int32)
        own = [
            (row_K.ctypes.data, self.weights_LK[layer].ctypes.data, self.replaced_L[layer:].ctypes.data)
            for layer, row_K in enumerate(self.chosen_LK)
        ]
        self._turns = np.array([(*astuple(m), *mine) for m, mine in zip(memories, own, strict=True)], dtype=np.int64)
        self._address = self._turns.ctypes.data
        self._out = np.zeros(2 + 2 * MOST_EXPERTS, dtype=np.int32)
        self._out_address = self._out.ctypes.data
        self._rule: PlainRule | None = None
        self._rule_memory: np.ndarray | None = None
        self._run = library.raymoe_turns
        number = ctypes.c_int64
        self._run.argtypes = [
            ctypes.c_void_p,
            *[number] * 3,
            ctypes.c_void_p,
            ctypes.c_float,
            *[number] * 2,
            *[ctypes.c_void_p] * 3,
        ]
        self._run.restype = number

    def run(
        self,
        first: int,
        turn: int,
        rule: PlainRule | None,
        factor: float,
        most: int,
        patience_ns: int,
        copy: tuple[int, int] | None,
    ) -> Passed:
        """Go through the layers from ``first`` on, until one of them can't be answered at once.

        Args:
            turn: of the device.
            rule: None: rows that lack experts are decided by somebody else.
            factor: where that is so, an expert is surely needed that weighs this many times the lightest.
            most: loads to begin.
            patience_ns: for the device to come to the next layer.
            copy: address of ``cuMemcpyHtoDAsync`` or what does the same, and its stream; None: begin nothing.
        """
        function, stream = copy or (None, None)
        if rule != self._rule:
            self._rule, self._rule_memory = rule, rule_memory(rule)
        given = None if self._rule_memory is None else self._rule_memory.ctypes.data
        layer = self._run(
            self._address,
            first,
            len(self._turns),
            turn,
            given,
            factor,
            most,
            patience_ns,
            function,
            stream,
            self._out_address,
        )
        status, count = self._out[:2].tolist()
        begun = self._out[2 : 2 + 2 * count].reshape(-1, 2).tolist() if count else []
        return Passed(layer, bool(status), [(expert, slot) for expert, slot in begun])


RULE = np.dtype([("alpha", "f4"), ("is_sigmoid", "i4"), ("is_renormalised", "i4"), ("scale", "f4")])


def rule_memory(rule: PlainRule | None) -> np.ndarray | None:
    """As turns.cpp's ``Rule``."""
    if rule is None:
        return None
    return np.array([(rule.alpha, rule.score == "sigmoid", rule.renormalised, rule.scale)], dtype=RULE)


def native_turns(memories: list[TurnMemory]) -> NativeTurns | None:
    """None where there is no library, or too many experts for it."""
    library = native_library()
    if library is None or any(m.k > MOST_EXPERTS or m.experts > MOST_OF_LAYER for m in memories):
        return None
    return NativeTurns(library, memories)
