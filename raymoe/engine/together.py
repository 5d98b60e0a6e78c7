"""One step of several requests: the next token of each that decodes, and pieces of prompts beside them.

Where the trunk bears it, all of it is one forward; else the decoding rows are one, and each piece has one of its own.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from raymoe.engine.scheduler_protocol import RowScheduler
from raymoe.engine.sequence import Sequence
from raymoe.model.blocks import MOST_ROWS
from raymoe.model.runner import Runner
from raymoe.types import Routing

LONE_TOKENS = 512  # of a prompt's piece while nobody decodes: matrix products are efficient, and a cancellation is near


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Of one request in a step: how many of its unread tokens are read, and with which alpha."""

    sequence: Sequence
    count: int
    alpha: float

    @property
    def decodes(self) -> bool:
        """Whether it is the next token of an answer."""
        return bool(self.sequence.answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What came of a part: the logits after its last token [vocabulary], and what it cost."""

    part: Part
    logits_V: torch.Tensor
    cost: Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A step: what came of its parts, and the seconds of its decoding (with what the same forward read) and of all."""

    reads: list[Read]
    decode_s: float
    whole_s: float


def read_together(runner: Runner, experts: RowScheduler, parts: list[Part]) -> Done:
    """Read some tokens of each request; their caches grow. Where it fails, the caches are lost."""
    decoding = [part for part in parts if part.decodes]
    pieces = [part for part in parts if not part.decodes]
    start_s = time.perf_counter()
    mixed = runner.mixes and decoding and pieces and sum(part.count for part in parts) <= MOST_ROWS
    done = [] if not decoding else _one_forward(runner, experts, parts if mixed else decoding)
    decode_s = time.perf_counter() - start_s if decoding else 0.0
    if not mixed:
        done += [_piece(runner, experts, part) for part in pieces]
    return Done(reads=done, decode_s=decode_s, whole_s=time.perf_counter() - start_s)


def _one_forward(runner: Runner, experts: RowScheduler, parts: list[Part]) -> list[Read]:
    """Parts as rows of one forward, or one part alone in the way that takes least."""
    alphas = np.repeat([part.alpha for part in parts], [part.count for part in parts])
    experts.alpha = float(alphas[0]) if (alphas == alphas[0]).all() else alphas
    states, tokens = [], []
    for part in parts:
        sequence = part.sequence
        if sequence.state is None:
            sequence.state = runner.empty()
        mine = sequence.next_tokens(part.count)
        if part.decodes:
            experts.read(sequence.id, mine[0], sequence.state)
        states.append(sequence.state)
        tokens.append(mine)
    if len(parts) == 1:
        logits_BV = runner.decode(states[0], tokens[0][0]).unsqueeze(0)
    else:
        logits_BV = runner.read_together(states, tokens)
    costs = iter(experts.take_costs(len(alphas)))
    return [
        Read(part=part, logits_V=logits_V, cost=sum((next(costs) for _ in range(part.count)), Routing()))
        for part, logits_V in zip(parts, logits_BV, strict=True)
    ]


def _piece(runner: Runner, experts: RowScheduler, part: Part) -> Read:
    """A piece of a prompt in a forward of its own; a whole prompt as if there were no pieces."""
    sequence, experts.alpha = part.sequence, part.alpha
    tokens = sequence.next_tokens(part.count)
    if sequence.state is None and part.count == sequence.unread:
        logits_V, sequence.state = runner.prefill(tokens)
    else:
        if sequence.state is None:
            sequence.state = runner.empty()
        logits_V = runner.read_on(sequence.state, tokens)
    return Read(part=part, logits_V=logits_V, cost=experts.take_cost())
