"""How many drafts a pass of the model should read along.

A pass reads the current token and n drafts, and keeps as many of them as the model would have chosen itself, one after
the other, and one token more. Where each draft holds with probability a if those before it did, that makes
``1 + a + ... + a^n`` tokens (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023,
equation 1). A longer pass computes more and, what weighs more here, needs more experts, all of which come over links.
So a pass takes as long as its slower half: computing, or loading what its positions need together. Each is a line
through what was measured of passes of different lengths; the best n is the one with the most tokens per second.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ASSUMED_SLOPE = 0.25  # of a pass of one position, for each more, until passes of two lengths were measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What a pass takes by the positions that it reads: ``first`` for one, ``more`` for each further one."""

    first: float
    more: float

    def at(self, positions: int) -> float:
        """For a pass of so many positions."""
        return self.first + (positions - 1) * self.more

    def times(self, factor: float) -> "Line":
        """So many times as much."""
        return Line(first=self.first * factor, more=self.more * factor)


NOTHING = Line(first=0.0, more=0.0)


def fitted(means: Mapping[int, float]) -> Line:
    """The line through measured means by positions; never falling, for no longer pass is cheaper.

    Least squares. With one length measured the slope is assumed; with none, all is free, so that some pass is tried.
    """
    if not means:
        return NOTHING
    middle_x, middle_y = sum(means) / len(means), sum(means.values()) / len(means)
    spread = sum((x - middle_x) ** 2 for x in means)
    if spread:
        slope = max(0.0, sum((x - middle_x) * (y - middle_y) for x, y in means.items()) / spread)
    else:
        slope = ASSUMED_SLOPE * middle_y / (1 + ASSUMED_SLOPE * (middle_x - 1))
    first = middle_y - (middle_x - 1) * slope
    if first <= 0.0:  # steeper than any pass can be whose first position takes time too
        return Line(first=middle_y / middle_x, more=middle_y / middle_x)
    return Line(first=first, more=slope)


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that a pass with so many drafts makes."""
    return sum(acceptance**place for place in range(drafts + 1))


def best_drafts(acceptance: float, seconds: Line, loading: Line, most: int) -> int:
    """How many drafts make the most tokens per second; the fewest of those that are equal.

    Args:
        acceptance: probability that a draft holds, given those before it did; 0 to 1.
        seconds: that passes take.
        loading: seconds of the links for the experts of a pass, the busiest link's share.
        most: drafts that are allowed.
    """

    def rate(drafts: int) -> float:
        pass_s = max(seconds.at(1 + drafts), loading.at(1 + drafts))
        return expected_tokens(acceptance, drafts) / pass_s if pass_s > 0.0 else expected_tokens(acceptance, drafts)

    return max(range(most + 1), key=lambda drafts: (rate(drafts), -drafts))
