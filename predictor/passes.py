"""How a model cuts a sequence into passes: forwards that read one position, or several where guesses are read along.

Load orders and plans are labelled by the pass that will need them, by the first position that it reads: the experts of
all its positions are needed together, layer by layer. The shadow knows the pass in hand, which it is told of, and takes
it that those to come read as many drafts as was said last. Where they turn out shorter, what was ordered for their last
positions came too early for the next pass, which loads it on demand: that costs time, never correctness.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """The pass in hand reads ``reads`` positions from ``first`` on; each one after it reads ``each``."""

    first: int
    reads: int = 1
    each: int = 1

    def of(self, position: int) -> int:
        """The first position of the pass that reads this one; of passes gone by nothing is known but the position."""
        after = self.first + self.reads
        if position < self.first:
            return position
        return self.first if position < after else position - (position - after) % self.each

    def end(self, ahead: int) -> int:
        """The position after the last one that the ``ahead``-th pass reads; the one in hand is 0."""
        return self.first + self.reads + ahead * self.each
