"""The engine: a step loop over a set of requests.

One thread owns the model and every sequence. Others submit and cancel; answers go out through a callback, in
chunks. Each step runs one pass of all running requests, in which each makes a token; or a pass of each, where the
architecture or the policy lets no rows join, or a shadow guesses several tokens. Then it admits waiting ones.
"""

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from raymoe.config import SchedulingConfig, TrunkConfig
from raymoe.engine.drafting import Drafting
from raymoe.engine.request import Chunk, SamplingParams, TokenLogprob, Usage
from raymoe.engine.sampling import Sampler, SamplingDefaults
from raymoe.engine.scheduler_protocol import RowScheduler, Scheduler
from raymoe.engine.sequence import EngineReport, OnChunk, RequestId, Sequence
from raymoe.engine.text import Decoder, TextStream
from raymoe.errors import EngineStoppedError, OverloadedError, RaymoeError, RequestError
from raymoe.model.runner import Runner
from raymoe.model.trials import make_cuttable
from raymoe.observe.sink import Silent, Sink
from raymoe.placement.alpha import AlphaControl
from raymoe.types import Routing

log = logging.getLogger(__name__)

MOST_IDS = 1 << 30  # first id; forced sequences begin at 2^31
IDLE_WAIT_S = 0.5  # how often an idle engine looks whether it should stop


class Engine:
    """Runs requests on the trunk.

    Args:
        context: most tokens of prompt and answer together; None where the model names no limit.
        end_tokens: the model's ends of sequence.
        drafting: says which guesses of a shadow are read along; None: none are.

    Attributes:
        experts: the say on routing. Another may be put in its place while no request is under way.
        sink: told of requests and steps.
    """

    def __init__(
        self,
        runner: Runner,
        experts: Scheduler,
        config: TrunkConfig,
        scheduling: SchedulingConfig,
        *,
        tokenizer: Decoder | None,
        defaults: SamplingDefaults,
        end_tokens: frozenset[int],
        context: int | None,
        vocabulary: int,
        max_output_tokens: int,
        drafting: Drafting | None = None,
    ) -> None:
        self._runner = runner
        self.experts = experts
        self.sink: Sink = Silent()
        self._config = config
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._end_tokens = end_tokens
        self._context = context
        self._vocabulary = vocabulary
        self._max_output_tokens = max_output_tokens
        self._drafting = drafting
        self._ids = itertools.count(secrets.randbelow(MOST_IDS) + 1)  # workers outlive engines: no id twice
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        totals = ("finished", "failed", "prompt", "completion", "decode_s", "steps")
        self._totals: dict[str, Any] = dict.fromkeys(totals, 0)
        self._routing = Routing()
        self._kv_per_token: int | None = None
        self._control: AlphaControl | None = None
        self.reconfigure(scheduling)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- any thread -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the step loop."""
        self._thread.start()

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_chunk: OnChunk,
        defaults: SamplingDefaults | None = None,
    ) -> RequestId:
        """Queue a request. Raises RequestError for a bad one, OverloadedError where the queue is full."""
        sequence = self._prepare(prompt, params, on_chunk, defaults or self._defaults)
        with self._wake:
            self._check_alive()
            if len(self._waiting) >= self._config.max_waiting + max(0, self._config.max_running - len(self._running)):
                raise OverloadedError(
                    f"{len(self._waiting)} requests are waiting already, no more are taken; try again later"
                )
            self.sink.submitted(sequence.id)
            self._waiting.append(sequence)
            self._wake.notify()
        return sequence.id

    def cancel(self, request: RequestId) -> None:
        """End a request; it gets a last chunk with finish_reason "cancelled". Unknown ids are ignored."""
        with self._wake:
            for sequence in (*self._running, *self._waiting):
                if sequence.id == request:
                    sequence.cancelled = True
            self._wake.notify()

    def stop(self) -> None:
        """Stop the loop; requests that are not finished end with EngineStoppedError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Schedule by other settings from the next step on; requests keep the alpha that they asked for."""
        budget_s = scheduling.tpot_budget_s if scheduling.substitutes else None
        with self._wake:
            self._scheduling = scheduling
            self._alpha = scheduling.alpha_of(None)
            self._control = AlphaControl(tpot_budget_s=budget_s, alpha_max=scheduling.alpha_max) if budget_s else None
            self.experts.reconfigure(scheduling)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs."""
        return not self._running

    @property
    def failure(self) -> BaseException | None:
        """Why the loop died, or None while it is well."""
        return self._failure

    def report(self) -> EngineReport:
        """Counts and totals."""
        with self._wake:
            running = list(self._running)
            return EngineReport(
                running=len(running),
                waiting=len(self._waiting),
                finished=self._totals["finished"],
                failed=self._totals["failed"],
                prompt_tokens=self._totals["prompt"],
                completion_tokens=self._totals["completion"],
                kv_bytes=self._kv_bytes(running),
                kv_budget_bytes=self._config.kv_memory,
                routing=self._routing,
                decode_s=self._totals["decode_s"],
                steps=self._totals["steps"],
                alpha=self._alpha,
            )

    def _prepare(
        self, prompt: list[int], params: SamplingParams, on_chunk: OnChunk, defaults: SamplingDefaults
    ) -> Sequence:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        bad = next((token for token in prompt if not 0 <= token < self._vocabulary), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad} is outside of the vocabulary (0 to {self._vocabulary - 1})", param="prompt"
            )
        room = self._max_output_tokens
        if self._context is not None:
            room = min(room, self._context - len(prompt))
            if room < 1:
                raise RequestError(
                    f"the prompt has {len(prompt)} tokens; with at least one to answer, the model's context of "
                    f"{self._context} tokens is exceeded: shorten it",
                    param="prompt",
                )
        wanted = params.max_tokens
        if wanted is not None and not 1 <= wanted <= room:
            limit = (
                f"the prompt of {len(prompt)} tokens leaves room for {room}" if wanted > 0 else "allowed is 1 or more"
            )
            raise RequestError(f"max_tokens is {wanted}; {limit}", param="max_tokens")
        try:
            alpha = None if params.quality is None else self._scheduling.alpha_of(params.quality)
        except ValueError as error:
            raise RequestError(str(error), param="quality") from error
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_tokens)
        return Sequence(
            id=RequestId(next(self._ids)),
            prompt=list(prompt),
            max_tokens=wanted if wanted is not None else room,
            end_tokens=ends,
            sampler=Sampler(params, defaults),
            text=TextStream(self._tokenizer, params.stop),
            on_chunk=on_chunk,
            alpha=alpha,
        )

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(f"the engine has failed: {self._failure}") from self._failure
        if self._stopping:
            raise EngineStoppedError("the engine is stopping")

    # --- the engine's thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        try:
            while not self._stopping:
                if not self.step():
                    with self._wake:
                        self._wake.wait_for(lambda: self._stopping or self._waiting, timeout=IDLE_WAIT_S)
        except BaseException as error:
            log.exception("the engine's loop failed")
            self._failure = error
        self._end_all(EngineStoppedError(f"the engine stopped: {self._failure or 'shut down'}"))

    def step(self) -> bool:
        """One token of every running request at least, then of waiting ones. Returns whether there was work."""
        self._drop_cancelled()
        self.sink.step(len(self._running))
        running, experts = list(self._running), self.experts
        joins = len(running) > 1 and self._runner.joins and self._drafting is None
        if joins and isinstance(experts, RowScheduler):
            self._advance_together(running, experts)
        else:
            for sequence in running:
                self._advance(sequence)
        while (admitted := self._next_admitted()) is not None:
            self._advance(admitted)
        return bool(self._running or self._waiting)

    def _next_admitted(self) -> Sequence | None:
        with self._wake:
            if not self._waiting or len(self._running) >= self._config.max_running:
                return None
            if self._running and not self._kv_fits(self._waiting[0]):
                return None
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            self.sink.admitted(sequence.id)
            return sequence

    def _kv_fits(self, sequence: Sequence) -> bool:
        """Whether the caches of all running requests and this one, grown to the full, stay in the budget."""
        if self._config.kv_memory is None or self._kv_per_token is None:
            return True
        tokens = sum(len(other.prompt) + other.max_tokens for other in (*self._running, sequence))
        return tokens * self._kv_per_token <= self._config.kv_memory

    def _advance(self, sequence: Sequence) -> None:
        """One pass of a request, and the tokens that it makes."""
        self.experts.alpha = self._alpha_of(sequence)
        self._guarded(sequence, partial(self._pass, sequence))

    def _guarded(self, sequence: Sequence, work: Callable[[], object]) -> None:
        """Do something for a request; an error ends this request only."""
        try:
            work()
        except Exception as error:  # one request's failure must not take the others down
            log.exception("request %d failed", sequence.id)
            self._totals["failed"] += 1
            self._remove(sequence)
            self.experts.take_cost()
            sequence.on_chunk(error)

    def _pass(self, sequence: Sequence) -> None:
        if sequence.state is not None:
            self._decode(sequence)
        elif not sequence.answer:
            self._read_prompt(sequence)
        else:  # its cache was lost in a step that failed
            _, sequence.state = self._runner.prefill([*sequence.prompt, *sequence.answer[:-1]])
            self._decode(sequence)

    def _alpha_of(self, sequence: Sequence) -> float:
        return self._alpha if sequence.alpha is None else sequence.alpha

    def _advance_together(self, sequences: list[Sequence], experts: RowScheduler) -> None:
        """One pass of several requests. Where it fails each goes on alone, so that errors end whom they concern."""
        try:
            logits_BV, costs = self._decode_together(sequences, experts)
        except Exception as error:
            log.exception("a step of %d requests failed; each is run alone", len(sequences))
            if not isinstance(error, RaymoeError):  # not a worker's or a request's fault: it would fail again
                self._runner.joins = False
                log.warning("requests have steps of their own from now on")
            self.experts.take_cost()
            for sequence in sequences:
                sequence.state = None
                self._advance(sequence)
            return
        for sequence, logits_V, cost in zip(sequences, logits_BV, costs, strict=True):
            self._account(sequence, cost)
            self._guarded(sequence, partial(self._choose, sequence, logits_V.unsqueeze(0), []))

    def _decode_together(self, sequences: list[Sequence], experts: RowScheduler) -> tuple[torch.Tensor, list[Routing]]:
        """Read the last token of each; returns the logits after them, and what each cost."""
        start_s = time.perf_counter()
        alphas = [self._alpha_of(sequence) for sequence in sequences]
        experts.alpha = alphas[0] if len(set(alphas)) == 1 else np.array(alphas)
        states, lasts = [], []
        for sequence in sequences:
            assert sequence.state is not None
            experts.read(sequence.id, sequence.answer[-1], sequence.state)
            states.append(sequence.state)
            lasts.append(sequence.answer[-1])
        logits_BV = self._runner.decode_together(states, lasts)
        took_s = time.perf_counter() - start_s
        self._totals["decode_s"] += took_s
        self._totals["steps"] += 1
        follower = next((sequence for sequence in sequences if sequence.alpha is None), sequences[0])
        self._follow_budget(follower, took_s)
        return logits_BV, experts.take_costs(len(sequences))

    def _read_prompt(self, sequence: Sequence) -> None:
        if self._drafting is not None:
            self._drafting.begin(sequence.id)
        self.experts.begin(sequence.id, sequence.prompt, sequence.sampler.recipe)
        logits_V, sequence.state = self._runner.prefill(sequence.prompt)
        if self._drafting is not None and make_cuttable(sequence.state) is not None:
            self._drafting.end(sequence.id)
        self._totals["prompt"] += len(sequence.prompt)
        self._check_kv(sequence)
        self._account(sequence)
        self._choose(sequence, logits_V.unsqueeze(0), [])

    def _decode(self, sequence: Sequence) -> None:
        """Read the last token, and drafts where there are any, as far as the answer may go on."""
        start_s, last, state = time.perf_counter(), sequence.answer[-1], sequence.state
        assert state is not None
        room = sequence.max_tokens - len(sequence.answer) - 1
        drafts = None if self._drafting is None else self._drafting.offer(sequence.id, last, room)
        self.experts.read(sequence.id, last, state)
        trial = None if drafts is None else self._runner.read(state, [last, *drafts])
        logits_TV = self._runner.decode(state, last).unsqueeze(0) if trial is None else trial.logits_TV
        took_s = time.perf_counter() - start_s
        self._totals["decode_s"] += took_s
        self._totals["steps"] += 1
        self._follow_budget(sequence, took_s * len(self._running))
        cost = self._account(sequence)
        held = self._choose(sequence, logits_TV, drafts or [])
        if self._drafting is not None and trial is not None and sequence.state is not None:
            self._runner.keep(state, trial, 1 + held)
            self._drafting.note(sequence.id, drafts or [], held, took_s, cost.loads)

    def _choose(self, sequence: Sequence, logits_TV: torch.Tensor, drafts: list[int]) -> int:
        """Choose and emit the token after each position, for as long as drafts hold; returns how many do."""
        if drafts:
            self._account(sequence, Routing(drafted=len(drafts)))
        for place, logits_V in enumerate(logits_TV):
            token, logprob = sequence.sampler.choose(logits_V, sequence.prompt, sequence.answer)
            holds = drafts[place : place + 1] == [token]
            if holds:  # counted before it is told, for it may be the last
                self._account(sequence, Routing(accepted=1))
            self._totals["completion"] += 1
            self._emit(sequence, token, logprob)
            if not holds or sequence.state is None or sequence.cancelled:
                return place
        raise AssertionError("nothing was guessed for the last position")

    def _account(self, sequence: Sequence, cost: Routing | None = None) -> Routing:
        """Something cost a request this; None: what expert calls cost since the last time."""
        cost = self.experts.take_cost() if cost is None else cost
        sequence.routing += cost
        self._routing += cost
        return cost

    def _follow_budget(self, sequence: Sequence, tpot_s: float) -> None:
        """Let alpha follow the budget; requests with an alpha of their own tell nothing about it."""
        if sequence.alpha is not None:
            return
        with self._wake:
            if self._control is not None:
                self._alpha = self._control.update(self._alpha, tpot_s)

    def _check_kv(self, sequence: Sequence) -> None:
        assert sequence.state is not None
        used = Runner.cache_bytes(sequence.state)
        self._kv_per_token = max(self._kv_per_token or 0, -(-used // len(sequence.prompt)))
        budget = self._config.kv_memory
        needed = self._kv_per_token * (len(sequence.prompt) + sequence.max_tokens)
        if budget is not None and needed > budget:
            raise RequestError(
                f"{len(sequence.prompt)} prompt and {sequence.max_tokens} new tokens need {needed:,} bytes of cache, "
                f"kv_memory is {budget:,}: ask for fewer tokens or raise trunk.kv_memory",
                param="max_tokens",
            )

    def _emit(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        sequence.answer.append(token)
        self.sink.token(sequence.id)
        ended = token in sequence.end_tokens
        text = "" if ended else sequence.text.push(token)
        reason = None
        if ended or sequence.text.stopped:
            reason = "stop"
        elif len(sequence.answer) >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason, text + sequence.text.finish(), (token,), logprob)
        else:
            sequence.on_chunk(Chunk(text=text, token_ids=(token,), logprobs=(logprob,) if logprob else ()))

    def _finish(
        self,
        sequence: Sequence,
        reason: str,
        text: str,
        tokens: tuple[int, ...],
        logprob: TokenLogprob | None = None,
    ) -> None:
        self._remove(sequence)
        self._account(sequence)  # some of it is known only now that the sequence has ended
        self._totals["finished"] += 1
        sequence.on_chunk(
            Chunk(
                text=text,
                token_ids=tokens,
                logprobs=(logprob,) if logprob else (),
                finish_reason=reason,
                usage=Usage(prompt_tokens=len(sequence.prompt), completion_tokens=len(sequence.answer)),
                routing=sequence.routing,
            )
        )

    def _drop_cancelled(self) -> None:
        with self._wake:
            cancelled = [sequence for sequence in (*self._running, *self._waiting) if sequence.cancelled]
        for sequence in cancelled:
            self._finish(sequence, "cancelled", sequence.text.finish(), ())

    def _remove(self, sequence: Sequence) -> None:
        self.sink.ended(sequence.id)
        with self._wake:
            if sequence in self._running:
                self._running.remove(sequence)
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        if self._drafting is not None:
            self._drafting.end(sequence.id)
        self.experts.end(sequence.id)
        sequence.state = None

    def _end_all(self, error: BaseException) -> None:
        for sequence in (*self._running, *self._waiting):
            self._remove(sequence)
            sequence.on_chunk(error)

    @staticmethod
    def _kv_bytes(sequences: list[Sequence]) -> int:
        return sum(Runner.cache_bytes(sequence.state) for sequence in sequences if sequence.state is not None)
