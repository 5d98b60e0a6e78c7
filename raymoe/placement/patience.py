"""How long an answer may take before its worker is asked whether it is alive.

It follows from what the worker's calls took: the way there and back, computing by the pair, loading by the expert. Each
is remembered by a peak that wears off, which lies near the highest quantiles of what was measured lately and costs
nothing to keep. To be wrong costs a ping: whoever answers that is waited for on.
"""

from dataclasses import dataclass

FIRST_S = 0.5  # before anything was measured: first calls allocate, compile, and page in
FLOOR_S = 0.1  # a thread of a busy small machine waits that long for a core now and then
TIMES = 3.0  # as long as ever lately; less would ping for every hiccup, more would see a death later
WEAR = 0.98  # of a peak, per call: about fifty calls, six tokens of eight layers


@dataclass(slots=True)
class Patience:
    """With one worker.

    Attributes:
        way_s: of an answer but for computing and loading; None before the first.
        pair_s: to compute a (row, expert) pair.
        load_s: to load an expert.
    """

    way_s: float | None = None
    pair_s: float = 0.0
    load_s: float = 0.0

    def note(self, took_s: float, compute_s: float, pairs: int, loads: int) -> None:
        """A call was answered after so long. It had so many pairs, and waited for so many loads."""
        rest_s = max(0.0, took_s - compute_s)
        if loads:  # the way can't be told from the loads, which take longer
            self.load_s = max(rest_s / loads, WEAR * self.load_s)
        else:
            self.way_s = rest_s if self.way_s is None else max(rest_s, WEAR * self.way_s)
        self.pair_s = max(compute_s / pairs, WEAR * self.pair_s)

    def limit_s(self, pairs: int, loads: int) -> float:
        """How long a call with so many pairs, of which so many experts may have to be loaded, may take."""
        if self.way_s is None:
            return FIRST_S
        return max(FLOOR_S, TIMES * (self.way_s + pairs * self.pair_s + loads * self.load_s))
