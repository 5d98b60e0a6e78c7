"""The engine: a step loop over a set of requests.

One thread owns the model and every sequence. Others submit and cancel; answers go out through a callback, in
chunks. Each step lets waiting requests in, then makes a token of every request that decodes, in one pass of all of
them, and reads pieces of prompts beside. Or it runs a pass of each, where the architecture or the policy lets no rows
join, or a shadow guesses several tokens; then prompts are read whole.
"""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from raymoe.config import SchedulingConfig, TrunkConfig
from raymoe.engine.admission import Roster
from raymoe.engine.answers import Answers, tell
from raymoe.engine.blame import Blame
from raymoe.engine.drafting import Drafting
from raymoe.engine.intake import Intake
from raymoe.engine.parking import Owners, Parking
from raymoe.engine.piece_size import PieceSize
from raymoe.engine.prefixes import Kept, start_from_copy
from raymoe.engine.request import SamplingParams
from raymoe.engine.sampling import SamplingDefaults
from raymoe.engine.scheduler_protocol import RowScheduler, Scheduler
from raymoe.engine.sequence import EngineReport, OnChunk, RequestId, Sequence
from raymoe.engine.shortage import Shortage
from raymoe.engine.text import Decoder
from raymoe.engine.together import LONE_TOKENS, Done, Part, read_together
from raymoe.engine.totals import Totals
from raymoe.errors import DrainingError, EngineStoppedError, RaymoeError, RequestError
from raymoe.model.blocks import MOST_ROWS
from raymoe.model.kv_size import KvSize
from raymoe.model.runner import Runner
from raymoe.model.trials import make_cuttable
from raymoe.observe.sink import Silent, Sink
from raymoe.placement.alpha import AlphaControl
from raymoe.types import DeviceName, ExpertKey, Routing

log = logging.getLogger(__name__)

MOST_IDS = 1 << 30  # first id; forced sequences begin at 2^31
PARKED_WAIT_S = 0.05  # how often an engine that only has parked requests looks whether they can go on
IDLE_WAIT_S = 0.5  # how often an idle engine looks whether it should stop


class Engine:
    """Runs requests on the trunk.

    Args:
        context: most tokens of prompt and answer together; None where the model names no limit.
        end_tokens: the model's ends of sequence.
        drafting: says which guesses of a shadow are read along; None: none are.
        kv: memory of one sequence's cache; omitted: it is not counted.
        owners: knows when experts that nobody could be asked for are back; None: requests that need such ones fail.
        device_of: whose an expert is, to say who is to blame for an output that is no number; omitted: nobody is.
        ttft_slo_s: who would wait longer for a first token is refused; None: nobody is for that.
        clock: seconds, by which requests wait.

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
        kv: KvSize | None = None,
        owners: Owners | None = None,
        device_of: Callable[[ExpertKey], DeviceName] | None = None,
        ttft_slo_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self.experts = experts
        self.sink: Sink = Silent()
        self._config = config
        self._drafting = drafting
        self._clock = clock
        self._intake = Intake(
            tokenizer=tokenizer,
            defaults=defaults,
            end_tokens=end_tokens,
            context=context,
            vocabulary=vocabulary,
            max_output_tokens=max_output_tokens,
            kv=kv or KvSize(held=()),
            kv_budget_bytes=config.kv_memory,
            at_once_tokens=LONE_TOKENS if self._reads_pieces else 1 << 30,
        )
        self._ids = itertools.count(secrets.randbelow(MOST_IDS) + 1)  # workers outlive engines: no id twice
        self._roster = Roster(config, ttft_slo_s, clock)
        self._parking = Parking(owners, scheduling.recovery_timeout_s, clock)
        self._stopping = self._draining = False
        self._beat_s = clock()
        self._failure: BaseException | None = None
        self._totals = Totals()
        self._blame = Blame(runner, self._totals, device_of)
        self._shortage = Shortage(runner, self._roster, self._totals)
        self._piece_size = PieceSize(config.prefill_chunk)
        self._answers = Answers(self._totals, self._end, lambda request: self.sink.token(request))
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
        """Queue a request. Raises RequestError for a bad one, and what ``check_room`` raises."""
        try:
            alpha = None if params.quality is None else self._scheduling.alpha_of(params.quality)
        except ValueError as error:
            raise RequestError(str(error), param="quality") from error
        request = RequestId(next(self._ids))
        sequence = self._intake.take(request, prompt, params, on_chunk, defaults, alpha, self._clock())
        with self._roster.changed:
            self._check_alive()
            self._roster.put(sequence, beside=len(self._parking))
            self.sink.submitted(sequence.id)
        return sequence.id

    def check_room(self, priority: int = 0) -> None:
        """Whether a request would be taken now, before anything is done for it.

        Raises OverloadedError, DrainingError or EngineStoppedError.
        """
        with self._roster.changed:
            self._check_alive()
            self._roster.check_room(priority, beside=len(self._parking))

    def cancel(self, request: RequestId) -> None:
        """End a request; it gets a last chunk with finish_reason "cancelled". Unknown ids are ignored."""
        with self._roster.changed:
            self._roster.cancel(request)
            self._parking.cancel(request)

    def drain(self) -> None:
        """Take no new requests; those that wait or run go on."""
        with self._roster.changed:
            self._draining = True

    def stop(self) -> None:
        """Stop the loop; requests that are not finished end with EngineStoppedError."""
        with self._roster.changed:
            self._stopping = True
            self._roster.changed.notify()
        if self._thread.is_alive() and self._failure is None:
            self._thread.join(timeout=30)

    def give_up(self, error: BaseException) -> None:
        """The loop is stuck for good: tell everybody who asked, and take nothing more.

        Without the lock, for whoever is stuck may have it. A loop that comes loose after all ends.
        """
        self._failure, self._stopping = error, True
        for sequence in (*self._roster.running, *self._roster.waiting, *self._parking.sequences()):
            tell(sequence, error)

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Schedule by other settings from the next step on; requests keep the alpha that they asked for."""
        budget_s = scheduling.tpot_budget_s if scheduling.substitutes else None
        with self._roster.changed:
            self._scheduling = scheduling
            self._alpha = scheduling.alpha_of(None)
            self._parking.timeout_s = scheduling.recovery_timeout_s
            self._control = AlphaControl(tpot_budget_s=budget_s, alpha_max=scheduling.alpha_max) if budget_s else None
            self.experts.reconfigure(scheduling)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs."""
        return not self._roster.running and not len(self._parking)

    @property
    def failure(self) -> BaseException | None:
        """Why the loop died, or None while it is well."""
        return self._failure

    @property
    def stalled_s(self) -> float:
        """Since the loop last began a step, or looked for work: much more than a step takes means that it is stuck."""
        return self._clock() - self._beat_s

    def report(self) -> EngineReport:
        """Counts and totals."""
        roster, totals = self._roster, self._totals
        with roster.changed:
            running = list(roster.running)
            batch_rows, batch_tokens = totals.batch()
            return EngineReport(
                running=len(running),
                waiting=len(roster.waiting),
                parked=len(self._parking),
                finished=totals.finished,
                failed=totals.failed,
                prompt_tokens=totals.prompt,
                completion_tokens=totals.completion,
                kv_bytes=sum(Runner.held_bytes(state) for each in running if (state := each.state) is not None),
                kv_budget_bytes=self._config.kv_memory,
                routing=totals.routing,
                decode_s=totals.decode_s,
                steps=totals.steps,
                alpha=self._alpha,
                kv_set_aside_bytes=roster.ledger.set_aside_bytes,
                prefix_bytes=roster.prefixes.nbytes,
                prefixes=len(roster.prefixes),
                cached_tokens=totals.cached,
                admitted=totals.admitted,
                queue_s=totals.queue_s,
                batch_rows=batch_rows,
                batch_tokens=batch_tokens,
                shrunk=totals.shrunk,
                not_finite=totals.not_finite,
                faults=totals.faults_by_expert(),
            )

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(f"the engine has failed: {self._failure}") from self._failure
        if self._stopping:
            raise EngineStoppedError("the engine is stopping")
        if self._draining:
            raise DrainingError("the server is about to end and takes no new requests")

    # --- the engine's thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        try:
            while not self._stopping:
                self._beat_s = self._clock()
                if not self.step():
                    wait_s = PARKED_WAIT_S if len(self._parking) else IDLE_WAIT_S
                    with self._roster.changed:
                        self._roster.changed.wait_for(
                            lambda: self._stopping or len(self._roster.waiting), timeout=wait_s
                        )
        except BaseException as error:
            log.exception("the engine's loop failed")
            self._failure = error
        self._end_all(EngineStoppedError(f"the engine stopped: {self._failure or 'shut down'}"))

    def step(self) -> bool:
        """One token of every request that decodes at least, and some of the prompts. Returns whether there was work."""
        self._look_after_parked()
        for sequence in (*self._roster.cancelled(), *self._parking.cancelled()):
            self._answers.finish(sequence, "cancelled", sequence.text.finish())
        for sequence in self._roster.admit(self._clock()):
            self._totals.admit(sequence)
            self.sink.admitted(sequence.id)
        running = list(self._roster.running)
        self.sink.step(len(running))
        experts = self.experts  # after that: who looks on may put another in its place
        if self._reads_pieces and isinstance(experts, RowScheduler):
            self._step_together(running, experts)
        else:
            self._step_in_turns(running)
        return bool(self._roster.running or len(self._roster.waiting))

    def _look_after_parked(self) -> None:
        for sequence in self._parking.look():
            with self._roster.changed:
                self._parking.remove(sequence)
                self._roster.come_back(sequence)
        for sequence, error in self._parking.overdue():
            self._fail(sequence, error)

    @property
    def _reads_pieces(self) -> bool:
        """Whether prompts may be read piece by piece, and from copies."""
        return self._drafting is None and isinstance(self.experts, RowScheduler) and self._runner.reads_on

    def _step_in_turns(self, running: list[Sequence]) -> None:
        """A pass of each; those that decode in one, where that is possible."""
        decoding = [sequence for sequence in running if sequence.state is not None]
        experts, joins = self.experts, len(decoding) > 1 and self._drafting is None and self._runner.joins
        if running:
            self._totals.step(len(running), len(running))
        if joins and isinstance(experts, RowScheduler):
            self._advance_together([self._part(sequence, 1) for sequence in decoding], experts)
            running = [sequence for sequence in running if sequence not in decoding]
        for sequence in running:
            self._advance(sequence)

    def _step_together(self, running: list[Sequence], experts: RowScheduler) -> None:
        """A token of each that decodes, and pieces of prompts."""
        for sequence in running:
            if sequence.answer and sequence.state is None:  # its cache was lost in a step that failed
                self._advance(sequence)
        decoding = [sequence for sequence in running if sequence.answer and sequence.state is not None]
        parts = [self._part(sequence, 1) for sequence in decoding]
        reading = [sequence for sequence in running if not sequence.answer]
        most = max(1, MOST_ROWS - len(decoding)) if self._runner.mixes else LONE_TOKENS
        left = self._piece_size.tokens(len(decoding), most) if decoding else LONE_TOKENS
        for sequence in reading:
            if not left or (not decoding and parts):
                break
            if self._guarded(sequence, partial(self._begin, sequence)):
                parts.append(self._part(sequence, min(left, sequence.unread)))
                left -= parts[-1].count
        if parts:
            self._totals.step(len(parts), sum(part.count for part in parts))
            self._advance_together(parts, experts)

    def _part(self, sequence: Sequence, count: int) -> Part:
        return Part(sequence=sequence, count=count, alpha=self._alpha_of(sequence))

    def _begin(self, sequence: Sequence) -> None:
        """Before the first piece of a prompt."""
        if sequence.state is not None:
            return
        self.experts.begin(sequence.id, sequence.prompt, sequence.sampler.recipe)
        if self._runner.copies:
            store = self._roster.prefixes
            start_from_copy(self._runner, store, sequence, self._alpha_of(sequence), self._roster.running)

    def _advance(self, sequence: Sequence) -> None:
        """One pass of a request, and the tokens that it makes."""
        self.experts.alpha = self._alpha_of(sequence)
        work, forget = partial(self._pass, sequence), partial(self._forget_cache, sequence)
        self._guarded(sequence, partial(self._shortage.twice, work, forget))

    def _forget_cache(self, sequence: Sequence) -> None:
        """A pass has failed: what it has put into the cache is not to be relied upon."""
        self.experts.take_cost()
        sequence.state, sequence.cached = None, 0

    def _guarded(self, sequence: Sequence, work: Callable[[], object]) -> bool:
        """Do something for a request, and return whether it went well; an error ends this request only."""
        try:
            work()
        except Exception as error:  # one request's failure must not take the others down
            self.experts.alpha = self._alpha_of(sequence)
            self._lose(sequence, self._blame.explained(sequence, error))
            return False
        return True

    def _lose(self, sequence: Sequence, error: Exception) -> None:
        """A request cannot go on, for now or at all."""
        if self._parking.takes(error):
            log.warning("request %d waits: %s", sequence.id, error)
            with self._roster.changed:
                self._roster.leave(sequence)
                self._parking.park(sequence, error)
            self._let_go(sequence)
            sequence.cached = 0
            self._account(sequence)
            return
        log.error("request %d failed", sequence.id, exc_info=error)
        self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        self._remove(sequence)
        self.experts.take_cost()
        self._answers.fail(sequence, error)

    def _pass(self, sequence: Sequence) -> None:
        if sequence.state is not None:
            self._decode(sequence)
        elif not sequence.answer:
            self._read_prompt(sequence)
        else:  # its cache was lost in a step that failed
            tokens = [*sequence.prompt, *sequence.answer[:-1]]
            self.experts.end(sequence.id)
            self.experts.begin(sequence.id, tokens, sequence.sampler.recipe)
            _, sequence.state = self._runner.prefill(tokens)
            self._decode(sequence)

    def _alpha_of(self, sequence: Sequence) -> float:
        return self._alpha if sequence.alpha is None else sequence.alpha

    def _advance_together(self, parts: list[Part], experts: RowScheduler) -> None:
        """One step of several requests. Where it fails each goes on alone, so that errors end whom they concern."""
        done = self._read_together(parts, experts)
        if done is None:
            return
        decoding = [part.sequence for part in parts if part.decodes]
        if decoding:
            self._piece_size.note(len(decoding), sum(part.count for part in parts) - len(decoding), done.whole_s)
            self._totals.decode_s += done.decode_s
            self._totals.steps += 1
            follower = next((sequence for sequence in decoding if sequence.alpha is None), decoding[0])
            self._follow_budget(follower, done.decode_s)
        with self._answers.together():
            for read in done.reads:
                sequence = read.part.sequence
                self._account(sequence, read.cost)
                if not sequence.unread:
                    if not read.part.decodes:
                        self._note_prompt_read(sequence)
                    self._guarded(sequence, partial(self._answers.choose, sequence, read.logits_V.unsqueeze(0), []))

    def _read_together(self, parts: list[Part], experts: RowScheduler) -> Done | None:
        """None where that failed; everybody has gone on alone then."""
        read: list[Done] = []
        try:
            lasts = self._shortage.lasts_for(lambda: read.append(read_together(self._runner, experts, parts)))
        except Exception as error:
            self._lose_step(parts, error)
            return None
        if not lasts:
            self._read_anew(parts)
        return read[0] if lasts else None

    def _lose_step(self, parts: list[Part], error: Exception) -> None:
        if len(parts) == 1:
            self._lose(parts[0].sequence, error)
            return
        log.warning("a step of %d requests failed", len(parts), exc_info=error)
        if not isinstance(error, RaymoeError):  # not a worker's or a request's fault: it would again
            self._runner.joins = self._runner.mixes = False
            log.warning("requests have steps of their own from now on")
        self._read_anew(parts)

    def _read_anew(self, parts: list[Part]) -> None:
        """A step is lost, and the caches of whoever took part: each goes on alone."""
        for part in parts:
            self._forget_cache(part.sequence)
        for part in parts:
            self._advance(part.sequence)

    def _read_prompt(self, sequence: Sequence) -> None:
        if self._drafting is not None:
            self._drafting.begin(sequence.id)
        self.experts.begin(sequence.id, sequence.prompt, sequence.sampler.recipe)
        logits_V, sequence.state = self._runner.prefill(sequence.prompt)
        if self._drafting is not None and make_cuttable(sequence.state) is not None:
            self._drafting.end(sequence.id)
        self._note_prompt_read(sequence)
        self._account(sequence)
        self._answers.choose(sequence, logits_V.unsqueeze(0), [])

    def _note_prompt_read(self, sequence: Sequence) -> None:
        """The first token follows."""
        self._totals.prompt_read(sequence)
        assert sequence.begun_s is not None
        with self._roster.changed:
            self._roster.pace.read(self._clock() - sequence.begun_s)

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
        self._totals.decode_s += took_s
        self._totals.steps += 1
        self._follow_budget(sequence, took_s * len(self._roster.running))
        cost = self._account(sequence)
        held = self._answers.choose(sequence, logits_TV, drafts or [])
        if self._drafting is not None and trial is not None and sequence.state is not None:
            self._runner.keep(state, trial, 1 + held)
            self._drafting.note(sequence.id, drafts or [], held, took_s, cost.loads)

    def _account(self, sequence: Sequence, cost: Routing | None = None) -> Routing:
        """Something cost a request this; None: what expert calls cost since the last time."""
        cost = self.experts.take_cost() if cost is None else cost
        self._answers.account(sequence, cost, self._alpha_of(sequence))
        return cost

    def _follow_budget(self, sequence: Sequence, tpot_s: float) -> None:
        """Let alpha follow the budget; requests with an alpha of their own tell nothing about it."""
        if sequence.alpha is not None:
            return
        with self._roster.changed:
            if self._control is not None:
                self._alpha = self._control.update(self._alpha, tpot_s)

    def _end(self, sequence: Sequence) -> None:
        """A request is answered, or cancelled: its cache may serve prompts that begin as it did."""
        if sequence.state is not None and self._reads_pieces and self._runner.copies:
            self._roster.keep(Kept.of(sequence), sequence)
        self._remove(sequence)
        self._account(sequence)  # some of it is known only now that the sequence has ended

    def _remove(self, sequence: Sequence) -> None:
        self._roster.remove(sequence)
        self._parking.remove(sequence)
        self.sink.ended(sequence.id)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Of its cache, and of whatever follows it."""
        if self._drafting is not None:
            self._drafting.end(sequence.id)
        self.experts.end(sequence.id)
        sequence.state = None

    def _end_all(self, error: BaseException) -> None:
        for sequence in (*self._roster.running, *self._roster.waiting, *self._parking.sequences()):
            self._remove(sequence)
            tell(sequence, error)
