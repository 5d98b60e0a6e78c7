"""Teacher-forced decoding: given text instead of sampled tokens, one token per step, as in generation.

The experts sit behind the scheduler as always, so what it substitutes is felt by everything that follows. That makes
quality (the likelihood of the true next token) and speed (seconds per step) measurable on the same run. Several
sequences of equal length may decode in lockstep, as the rows of one forward.

B sequences (rows), N predicted tokens of each, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raymoe.engine.scheduler_protocol import Scheduler
from raymoe.errors import RequestError
from raymoe.model.runner import Runner, SequenceState
from raymoe.types import Routing

FORCED = 1 << 31  # sequences from here on are forced ones


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedStep:
    """One forward, and what it made of the next token.

    Attributes:
        nll_B: float32, negative log likelihood of each row's true next token, in nats.
        argmax_B: int64, each row's likeliest token.
        seconds: of the forward alone.
    """

    nll_B: np.ndarray
    argmax_B: np.ndarray
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """What forced decoding of a text gave. The first prediction is the prefill's, the others one step's each.

    Attributes:
        nll_BN: float32, negative log likelihood of every true token after the prefix, in nats.
        argmax_BN: int64, the likeliest token in its place.
        prefill_s: seconds of the forward over the prefix.
        step_s: float64 [N - 1], seconds of each decode step.
        routing: what the decode steps cost; without the prefill.
    """

    nll_BN: np.ndarray
    argmax_BN: np.ndarray
    prefill_s: float
    step_s: np.ndarray
    routing: Routing

    @property
    def perplexity(self) -> float:
        """Over all rows."""
        return math.exp(float(self.nll_BN.mean(dtype=np.float64)))


def forced(
    runner: Runner,
    scheduler: Scheduler,
    ids_BT: Sequence[Sequence[int]],
    *,
    prefix: int = 1,
    on_step: Callable[[], None] = lambda: None,
) -> Forced:
    """Decode given token ids, after a prefill of the first ``prefix`` of them.

    Set ``scheduler.alpha`` before: one for all rows, or an array with one for each. The engine that ``runner``
    belongs to must be idle.

    Args:
        ids_BT: token ids, one row per sequence, all rows equally long.
        on_step: called after every forward.

    Raises:
        RequestError: no or uneven rows, nothing after the prefix, or several rows where the architecture takes one.
    """
    scheduler.take_cost()  # of whatever ran before
    routing = Routing()
    steps: list[ForcedStep] = []
    for step in forced_steps(runner, ids_BT, prefix=prefix, scheduler=scheduler):
        cost = scheduler.take_cost()
        routing += cost if steps else Routing()
        steps.append(step)
        on_step()
    routing += scheduler.take_cost()  # what is known only at the end
    return Forced(
        nll_BN=np.stack([step.nll_B for step in steps], axis=1),
        argmax_BN=np.stack([step.argmax_B for step in steps], axis=1),
        prefill_s=steps[0].seconds,
        step_s=np.array([step.seconds for step in steps[1:]]),
        routing=routing,
    )


def forced_steps(
    runner: Runner, ids_BT: Sequence[Sequence[int]], *, prefix: int = 1, scheduler: Scheduler | None = None
) -> Iterator[ForcedStep]:
    """The steps of ``forced`` one by one, for callers that do something between them.

    Args:
        scheduler: told how the sequence goes on, as the engine tells it; rows in lockstep are foretold by nobody.
    """
    rows = [list(row) for row in ids_BT]
    check_rows(rows, prefix)
    followed = scheduler if len(rows) == 1 else None
    sequence = FORCED | time.monotonic_ns() & (FORCED - 1)  # like no request's, nor an earlier run's
    start_s = time.perf_counter()
    if followed is not None:
        followed.begin(sequence, rows[0][:prefix])
    try:
        yield from _steps(runner, rows, prefix, start_s, sequence, followed)
    finally:
        if followed is not None:
            followed.end(sequence)


def _steps(
    runner: Runner, rows: list[list[int]], prefix: int, start_s: float, sequence: int, followed: Scheduler | None
) -> Iterator[ForcedStep]:
    def before(tokens: list[int], state: SequenceState) -> None:
        if followed is not None:
            followed.read(sequence, tokens[0], state)

    logits_BV, decode = begin_rows(runner, [row[:prefix] for row in rows], before)
    for place in range(prefix, len(rows[0])):
        if logits_BV.is_cuda:
            torch.cuda.synchronize(logits_BV.device)
        seconds = time.perf_counter() - start_s
        tokens = [row[place] for row in rows]
        nll_B, argmax_B = judge(logits_BV, tokens)
        yield ForcedStep(nll_B=nll_B, argmax_B=argmax_B, seconds=seconds)
        if place + 1 < len(rows[0]):
            start_s = time.perf_counter()
            logits_BV = decode(tokens)


def begin_rows(
    runner: Runner,
    prompts: list[list[int]],
    before: Callable[[list[int], SequenceState], None] = lambda tokens, state: None,
) -> tuple[torch.Tensor, Callable[[list[int]], torch.Tensor]]:
    """Run the prompts; returns the logits [B, V] after each, and what runs one more token of each.

    Args:
        before: told of each row's token, and of the state, before they are run.
    """
    logits_BV, state = runner.start(prompts)

    def decode(tokens: list[int]) -> torch.Tensor:
        before(tokens, state)
        return runner.go_on(state, tokens)

    return logits_BV, decode


def judge(logits_BV: torch.Tensor, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Negative log likelihood of each row's token, and each row's likeliest one."""
    log_likelihood_BV = torch.log_softmax(logits_BV, dim=-1)
    chosen_B1 = torch.tensor(tokens, device=logits_BV.device).unsqueeze(1)
    nll_B = -log_likelihood_BV.gather(1, chosen_B1).squeeze(1)
    return nll_B.cpu().numpy(), logits_BV.argmax(dim=-1).cpu().numpy()


def check_rows(rows: list[list[int]], prefix: int) -> None:
    """Raise RequestError for what can't be decoded in lockstep."""
    lengths = sorted({len(row) for row in rows})
    if not rows or len(lengths) > 1:
        raise RequestError(f"forced decoding needs at least one sequence, and all of one length, not of {lengths}")
    if not 1 <= prefix < lengths[0]:
        raise RequestError(
            f"a prefix of {prefix} of {lengths[0]} tokens leaves nothing to decode; allowed is 1 to {lengths[0] - 1}"
        )
