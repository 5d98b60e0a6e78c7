"""From logits to what a client hears: tokens are chosen, become text, and go out in chunks."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from raymoe.engine.request import Chunk, TokenLogprob, Usage
from raymoe.engine.sequence import RequestId, Sequence
from raymoe.engine.totals import Totals
from raymoe.types import Routing

log = logging.getLogger(__name__)


class Answers:
    """Writes the answers of an engine. Used by its thread.

    Args:
        totals: counts tokens and costs here.
        on_end: does whatever a sequence's end needs, before its last chunk goes out.
        on_token: told of each token.
    """

    def __init__(
        self, totals: Totals, on_end: Callable[[Sequence], None], on_token: Callable[[RequestId], None]
    ) -> None:
        self._totals = totals
        self._on_end = on_end
        self._on_token = on_token
        self._ready: list[tuple[Sequence, Chunk | BaseException]] | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hold chunks back until the end of a step of several requests, and send all of them then.

        So those who listen wake up once, while the next step begins, and not between the choices of this one.
        """
        self._ready = []
        try:
            yield
        finally:
            ready, self._ready = self._ready, None
            for sequence, chunk in ready:
                tell(sequence, chunk)

    def choose(self, sequence: Sequence, logits_TV: torch.Tensor, drafts: list[int], alpha: float = 0.0) -> int:
        """Choose and emit the token after each position, for as long as drafts hold; returns how many do."""
        if drafts:
            self.account(sequence, Routing(drafted=len(drafts)), alpha)
        for place, logits_V in enumerate(logits_TV):
            token, logprob = sequence.sampler.choose(logits_V, sequence.prompt, sequence.answer)
            holds = drafts[place : place + 1] == [token]
            if holds:  # counted before it is told, for it may be the last
                self.account(sequence, Routing(accepted=1), alpha)
            self._totals.completion += 1
            self._emit(sequence, token, logprob)
            if not holds or sequence.state is None or sequence.cancelled:
                return place
        raise AssertionError("nothing was guessed for the last position")

    def account(self, sequence: Sequence, cost: Routing, alpha: float) -> None:
        """Something cost a request this, while experts could be substituted up to ``alpha``."""
        sequence.routing += cost
        self._totals.routing += cost
        if cost.substituted:
            sequence.inexact = max(sequence.inexact, alpha)
        if cost.degraded:  # whatever alpha others allow, this is not what they would get
            sequence.inexact = math.inf

    def _emit(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        sequence.answer.append(token)
        sequence.lost_s = None
        self._on_token(sequence.id)
        ended = token in sequence.end_tokens
        text = "" if ended else sequence.text.push(token)
        reason = None
        if ended or sequence.text.stopped:
            reason = "stop"
        elif len(sequence.answer) >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            self.finish(sequence, reason, text + sequence.text.finish(), (token,), logprob)
        else:
            self._send(sequence, Chunk(text=text, token_ids=(token,), logprobs=(logprob,) if logprob else ()))

    def finish(
        self,
        sequence: Sequence,
        reason: str,
        text: str,
        tokens: tuple[int, ...] = (),
        logprob: TokenLogprob | None = None,
    ) -> None:
        """The last chunk of an answer."""
        self._on_end(sequence)
        self._totals.finished += 1
        self._send(
            sequence,
            Chunk(
                text=text,
                token_ids=tokens,
                logprobs=(logprob,) if logprob else (),
                finish_reason=reason,
                usage=Usage(
                    prompt_tokens=len(sequence.prompt),
                    completion_tokens=len(sequence.answer),
                    cached_tokens=sequence.cached,
                ),
                routing=sequence.routing,
            ),
        )

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """An error in place of the last chunk."""
        self._totals.failed += 1
        self._send(sequence, error)

    def _send(self, sequence: Sequence, chunk: Chunk | BaseException) -> None:
        if self._ready is None:
            tell(sequence, chunk)
        else:
            self._ready.append((sequence, chunk))


def tell(sequence: Sequence, chunk: Chunk | BaseException) -> None:
    """Hand a chunk to whoever asked. One who fails at that is not asked again: the next step ends the request."""
    try:
        sequence.on_chunk(chunk)
    except Exception:
        log.exception("request %d: nobody takes its answer", sequence.id)
        sequence.cancelled = True
