"""The first microseconds of a turn, in C++ (``turns.cpp``): rows that are all there are answered, surely needed loads
are begun. Where there is no compiler ``engine.turns`` does the same in Python.

L layers.
"""

import ctypes
from dataclasses import astuple, dataclass

import numpy as np

from raymoe.kernels.building import native_library

MOST_EXPERTS = 64  # of a token, as turns.cpp has it


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
    """

    def __init__(self, library: ctypes.CDLL, memories: list[TurnMemory]) -> None:
        self._turns = np.array([astuple(memory) for memory in memories], dtype=np.int64)
        self._address = self._turns.ctypes.data
        self._out = np.zeros(2 + 2 * MOST_EXPERTS, dtype=np.int32)
        self._out_address = self._out.ctypes.data
        self._run = library.raymoe_turns
        number = ctypes.c_int64
        self._run.argtypes = [
            ctypes.c_void_p,
            *[number] * 3,
            ctypes.c_float,
            *[number] * 2,
            *[ctypes.c_void_p] * 3,
        ]
        self._run.restype = number

    def run(
        self, first: int, turn: int, factor: float, most: int, patience_ns: int, copy: tuple[int, int] | None
    ) -> Passed:
        """Go through the layers from ``first`` on, until one of them can't be answered at once.

        Args:
            turn: of the device.
            factor: an expert is surely needed that weighs this many times the lightest.
            most: loads to begin.
            patience_ns: for the device to come to the next layer.
            copy: address of ``cuMemcpyHtoDAsync`` or what does the same, and its stream; None: begin nothing.
        """
        function, stream = copy or (None, None)
        layer = self._run(
            self._address, first, len(self._turns), turn, factor, most, patience_ns, function, stream, self._out_address
        )
        status, count = self._out[:2].tolist()
        begun = self._out[2 : 2 + 2 * count].reshape(-1, 2).tolist() if count else []
        return Passed(layer, bool(status), [(expert, slot) for expert, slot in begun])


def native_turns(memories: list[TurnMemory]) -> NativeTurns | None:
    """None where there is no library, or a token has too many experts for it."""
    library = native_library()
    if library is None or any(memory.k > MOST_EXPERTS for memory in memories):
        return None
    return NativeTurns(library, memories)
