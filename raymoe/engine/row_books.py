"""The books of captured steps: rows that were answered, until it is entered what they used and scored.

A device that waits can't wait for books, so they are kept when there is time: of many rows in one go, for one costs as
much as many (``engine.turns`` says when).

K experts per token, E experts, N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from raymoe.engine.dialogue import Dialogue
from raymoe.engine.scheduler import ExpertScheduler
from raymoe.experts.staging import Staging


@dataclass(slots=True)
class Row:
    """One layer's, as it was computed.

    Attributes:
        misses: experts that were not there when the device came.
        replaced: how many experts C++ has put in the place of others.
        experts_K, weights_K: as computed, where that is known before the books are; None: the router's.
        scores_E: gate scores; None: not known yet.
    """

    layer: int
    misses: int = 0
    replaced: int = 0
    experts_K: np.ndarray | None = None
    weights_K: np.ndarray | None = None
    scores_E: np.ndarray | None = None


class RowBooks:
    """Answered rows, and where they are entered: the scheduler's scores, the slots' uses.

    Args:
        talks: of the layers; they keep what the device told of a row until it is entered.
    """

    def __init__(self, scheduler: ExpertScheduler, staging: Staging, talks: Sequence[Dialogue]) -> None:
        self._scheduler = scheduler
        self._staging = staging
        self._talks = talks
        self._rows: list[Row] = []

    def __len__(self) -> int:
        """Rows that were not entered yet."""
        return len(self._rows)

    def add(self, *rows: Row) -> None:
        """These were answered."""
        self._rows.extend(rows)

    def clear(self) -> None:
        """Enter none of them."""
        self._rows.clear()

    def enter(self) -> list[Row]:
        """Enter all; returns them. What the device told of them is of no more use here."""
        rows, self._rows = self._rows, []
        for _, group in groupby(rows, lambda row: (self._talks[row.layer].words, self._staging.experts(row.layer))):
            mine = list(group)
            self.complete(mine)
            scores = [row.scores_E for row in mine if row.scores_E is not None]
            self._staging.note_rows(
                np.array([row.layer for row in mine]),
                np.stack([row.experts_K for row in mine if row.experts_K is not None]),
                np.array([row.misses for row in mine]),
                np.stack(scores) if scores else None,
            )
        return rows

    def complete(self, rows: list[Row]) -> None:
        """Find out what is not known yet of rows that tell alike: their experts, and the gate scores of all."""
        open_rows = [row for row in rows if row.scores_E is None]
        if not open_rows:
            return
        layers = [row.layer for row in open_rows]
        words = self._talks[layers[0]].words
        told_NW = np.stack([self._talks[layer].told[: words.of_router] for layer in layers])
        experts_NK, weights_NK = words.chosen(told_NW)
        scores_NE = self._scheduler.note_rows(layers, experts_NK, weights_NK, words.router_logits(told_NW))
        for number, row in enumerate(open_rows):
            row.experts_K = experts_NK[number] if row.experts_K is None else row.experts_K
            if scores_NE is not None:
                row.scores_E = scores_NE[number]
                if row.replaced:
                    self._scheduler.note_replaced(row.layer, experts_NK[number], row.experts_K, scores_NE[number])
