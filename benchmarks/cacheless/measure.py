"""What is measured on a cacheless cluster, and how: time per token, its parts, the shadow's lead, time to first token.

L MoE layers.
"""

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.cacheless.cluster import Cluster
from benchmarks.harness import MOST_STOLEN, least_disturbed
from benchmarks.roofline import floor_s, needed_bytes
from predictor.shadow import Alignment
from raymoe.engine.cacheless import CachelessScheduler
from raymoe.engine.forced import forced
from raymoe.engine.service import ModelService
from raymoe.placement.grouping import group_count
from raymoe.placement.pipelining import DecodePipeline, predicted_tpot_s
from raymoe.types import Routing

WARM_STEPS = 8  # of each answer: the shadow gets into its stride


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer: mean seconds per token after the first ones, and what the expert calls of its decode steps cost.

    Attributes:
        timed: what the passes cost that ``tpot_s`` is of; ``timed_passes`` of them gave ``timed_tokens`` tokens.
        processor_s: seconds of processor per token, prompt and first tokens too, by who used them.
    """

    tpot_s: float
    ttft_s: float
    tokens: tuple[int, ...]
    routing: Routing
    timed: Routing = field(default_factory=Routing)
    timed_passes: int = 0
    timed_tokens: int = 0
    processor_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_pass(self) -> float:
        """1 without drafts."""
        return self.timed_tokens / self.timed_passes if self.timed_passes else 1.0

    @property
    def loaded_bytes(self) -> float:
        """What crossed the links for a token, needed or not."""
        return self.timed.bytes_loaded / self.timed_tokens if self.timed_tokens else 0.0


Task = Callable[[ModelService], Answer]
"""Something to decode."""


def saying(prompt: Sequence[int], tokens: int, **options: Any) -> Task:
    """What the model says itself: at temperature 1, unless the options say otherwise."""

    def decode(service: ModelService) -> Answer:
        times = [time.perf_counter()]
        found: list[int] = []
        asked = {"temperature": 1.0, "seed": 0, "ignore_eos": True, **options}
        with step_costs(service) as costs:
            for chunk in service.stream(list(prompt), max_tokens=tokens, **asked):
                times += [time.perf_counter()] * len(chunk.token_ids)
                found += chunk.token_ids
            assert chunk.routing is not None, "the last chunk says what the request cost"
        taken_s = [taken_s for taken_s, _ in costs[1:-1]]
        timed_s = timed_from(times, 1 + WARM_STEPS, taken_s) if tokens > WARM_STEPS + 1 else times[-1:]
        passes = [cost for taken_s, cost in costs[1:-1] if taken_s > timed_s[0]]
        drafts = Routing(drafted=chunk.routing.drafted, accepted=chunk.routing.accepted)  # the engine's, no call's
        return Answer(
            tpot_s=float(np.diff(timed_s).mean()) if len(timed_s) > 1 else 0.0,
            ttft_s=times[1] - times[0],
            tokens=tuple(found),
            routing=sum((cost for _, cost in costs[1:]), drafts),
            timed=sum(passes, Routing()),
            timed_passes=len(passes),
            timed_tokens=len(timed_s) - 1,
        )

    return decode


def reading(text: Sequence[int], prefix: int) -> Task:
    """Given text after a prompt of ``prefix`` tokens, guessed greedily."""

    def decode(service: ModelService) -> Answer:
        with step_costs(service) as costs:
            result = forced(service.runner, service.experts, [list(text)], prefix=prefix)
        passes = [cost for _, cost in costs[2 + WARM_STEPS : -1]]  # without what was before, and the prompt
        return Answer(
            tpot_s=float(result.step_s[WARM_STEPS:].mean()),
            ttft_s=result.prefill_s,
            tokens=tuple(result.argmax_BN[0].tolist()),
            routing=result.routing,
            timed=sum(passes, Routing()),
            timed_passes=len(passes),
            timed_tokens=len(passes),
        )

    return decode


def timed_from(times: Sequence[float], place: int, taken_s: Sequence[float]) -> Sequence[float]:
    """When tokens came, from the last one of the pass that gave the one at ``place``: its others took no time more.

    Args:
        taken_s: when each pass ended, before its tokens came.
    """
    following = bisect_right(taken_s, times[place])
    if following == len(taken_s):
        return times[-1:]
    return times[bisect_right(times, taken_s[following]) - 1 :]


@contextmanager
def step_costs(service: ModelService) -> Iterator[list[tuple[float, Routing]]]:
    """While open, when each forward of the request under way ended and what it cost.

    The prompt's comes first, and last what is known only when the request has ended.
    """
    scheduler, costs = service.experts, []
    own = scheduler.take_cost

    def take_cost() -> Routing:
        costs.append((time.perf_counter(), own()))
        return costs[-1][1]

    scheduler.take_cost = take_cost  # type: ignore[method-assign]
    try:
        yield costs
    finally:
        del scheduler.take_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """A decode step's parts, in seconds: the main node's share of a layer, the group's with messages, and the rest."""

    main_s: float
    worker_s: float
    head_s: float


@contextmanager
def timed_calls(service: ModelService) -> Iterator[list[tuple[float, float]]]:
    """While open, (begin, end) of each layer's expert calls."""
    scheduler, calls = service.experts, []
    own = scheduler.compute

    def compute(*arguments: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return own(*arguments)
        finally:
            calls.append((begin_s, time.perf_counter()))

    scheduler.compute = compute  # type: ignore[method-assign, assignment]
    try:
        yield calls
    finally:
        del scheduler.compute


def layer_times(cluster: Cluster, prompt: Sequence[int], tokens: int) -> LayerTimes:
    """With everything resident."""
    layers = len(cluster.sizes)
    with timed_calls(cluster.resident) as calls:
        saying(prompt, tokens)(cluster.resident)
    steps = np.array(calls[layers * (1 + WARM_STEPS) :]).reshape(-1, layers, 2)
    worker_s = float((steps[:, :, 1] - steps[:, :, 0]).mean())
    main_s = float((steps[:, 1:, 0] - steps[:, :-1, 1]).mean())
    token_s = float(np.diff(steps[:, 0, 0]).mean())
    return LayerTimes(main_s=main_s, worker_s=worker_s, head_s=token_s - layers * (main_s + worker_s))


@dataclass(slots=True)
class Lead:
    """How far the shadow is ahead when the main model comes to a layer: layers planned from there on, that one too."""

    layers: list[int] = field(default_factory=list)

    @contextmanager
    def watched(self, service: ModelService, count: int) -> Iterator[None]:
        """While open, note the lead at every layer of every decode step."""
        scheduler = service.experts
        assert isinstance(scheduler, CachelessScheduler)
        foresight = scheduler.foresight
        own = foresight.plan

        def plan(layer: int) -> Any:
            found = own(layer)
            step, lead = foresight.step, 0
            if step is not None and not foresight.in_prompt:
                position, at = step.position, layer
                while foresight.book.plan(type(step)(sequence=step.sequence, position=position), at) is not None:
                    lead += 1
                    position, at = (position, at + 1) if at + 1 < count else (position + 1, 0)
                self.layers.append(lead)
            return found

        foresight.plan = plan  # type: ignore[method-assign]
        try:
            yield
        finally:
            del foresight.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to foretell, or not to."""

    name: str
    alignment: Alignment | None = None
    at_random: bool = False
    is_resident: bool = False

    def run(self, cluster: Cluster, task: Task) -> Answer:
        """One task done this way."""
        service = cluster.resident if self.is_resident else cluster.foretold
        if self.alignment is not None:
            cluster.align(self.alignment, at_random=self.at_random)
        elif not self.is_resident:
            service = cluster.unforetold
        before_s = cluster.processor_s()
        done = task(service)
        per_token = {who: (s - before_s[who]) / len(done.tokens) for who, s in cluster.processor_s().items()}
        return replace(done, processor_s=per_token)


RESIDENT = Variant(name="everything resident", is_resident=True)
AHEAD = Variant(name="both alignments, run ahead", alignment=Alignment())
LATE = Variant(name="1 both alignments", alignment=Alignment(run_ahead=0))
ABLATION = (
    LATE,
    Variant(name="2 token only", alignment=Alignment(kv_every=0, run_ahead=0)),
    Variant(name="3 KV only", alignment=Alignment(token_every=0, run_ahead=0)),
    Variant(name="4 none", alignment=Alignment(token_every=0, kv_every=0, run_ahead=0)),
    Variant(name="5 random prefetch", alignment=Alignment(run_ahead=0), at_random=True),
    Variant(name="6 load after routing"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What variants answered in turns.

    Attributes:
        answers: by variant, one of each round.
        stolen: by round, the share of the processors' time that the host stole meanwhile.
    """

    answers: dict[str, list[Answer]]
    stolen: list[float]

    @property
    def disturbed_rounds(self) -> int:
        """Rounds of which too much was stolen, however often they were repeated."""
        return sum(share > MOST_STOLEN for share in self.stolen)

    def about_rounds(self) -> dict[str, Any]:
        """For JSON."""
        return {"rounds": len(self.stolen), "disturbed_rounds": self.disturbed_rounds, "stolen_by_round": self.stolen}

    def caption(self) -> str:
        """For tables."""
        disturbed = f"{self.disturbed_rounds} of {len(self.stolen)} disturbed"
        return f"stolen by the host: {max(self.stolen):.0%} of a round at most, {disturbed}"


def by_rounds(rounds: Sequence[Callable[[], Mapping[str, Answer]]]) -> Found:
    """One answer of every variant from each round; rounds that the host disturbed are repeated."""
    kept = [least_disturbed(one) for one in rounds]
    answers = {name: [each.result[name] for each in kept] for name in kept[0].result}
    return Found(answers=answers, stolen=[each.stolen for each in kept])


def in_turns(cluster: Cluster, variants: Sequence[Variant], tasks: Sequence[Task]) -> Found:
    """Each variant does each task, in turns; one answer before that warms up."""
    for variant in variants:
        variant.run(cluster, saying([1, 2, 3], WARM_STEPS + 4))

    def one_round(task: Task) -> dict[str, Answer]:
        return {variant.name: variant.run(cluster, task) for variant in variants}

    found = by_rounds([partial(one_round, task) for task in tasks])
    for name, answers in found.answers.items():
        for mine, theirs in zip(answers, found.answers[variants[0].name], strict=True):
            assert mine.tokens == theirs.tokens, f"{name} gave other tokens than {variants[0].name}"
    return found


def relative(found: Found, name: str, base: str = RESIDENT.name) -> list[float]:
    """Speed of a variant over the base's, answer by answer."""
    pairs = zip(found.answers[name], found.answers[base], strict=True)
    return [theirs.tpot_s / mine.tpot_s for mine, theirs in pairs]


def roofline_fractions(cluster: Cluster, found: Found, name: str) -> list[float]:
    """Share of its roofline that a variant reached, answer by answer, with the links as they are now."""
    resident_s = min(answer.tpot_s for answer in found.answers[RESIDENT.name])
    return [roofline_fraction(cluster, answer, resident_s) for answer in found.answers[name]]


def roofline_fraction(cluster: Cluster, answer: Answer, resident_s: float) -> float:
    """Of one answer.

    Args:
        resident_s: per token with everything resident, the fastest of the run.
    """
    floor = floor_s(
        resident_s=resident_s,
        moved_bytes=needed_bytes(answer.timed, cluster.expert_bytes) / max(1, answer.timed_passes),
        link_bytes_per_s=cluster.link_bytes_per_s,
        tokens_per_pass=answer.tokens_per_pass,
    )
    return floor / answer.tpot_s


def predicted_s(cluster: Cluster, times: LayerTimes, load_s: float, **more: Any) -> float:
    """What the timing model says of a link."""
    setup = cluster.setup
    pipeline = DecodePipeline(
        layers=len(cluster.sizes),
        groups=group_count(setup.workers, setup.group_size),
        main_s=times.main_s,
        worker_s=times.worker_s,
        head_s=times.head_s,
        load_s=load_s,
        loads=setup.loads,
        spare_slots=setup.slots - setup.loads,
        **more,
    )
    return predicted_tpot_s(pipeline)


def agreeing(service: ModelService, prompt: Sequence[int], tokens: int, rate: float, seed: int) -> list[int]:
    """A text that a greedy guess gets right with about this probability: the model's own words, some exchanged."""
    random = np.random.default_rng(seed)
    text = list(prompt)
    vocabulary = service.checkpoint.config.get_text_config().vocab_size
    while len(text) < len(prompt) + tokens:
        run = int(random.geometric(1 - rate)) - 1 if rate < 1 else tokens
        if run > 0:
            text += saying(text, min(run, tokens), temperature=0.0)(service).tokens
        text.append(int(random.integers(vocabulary // 8, vocabulary)))
    return text[: len(prompt) + tokens]


def median_ms(values: Sequence[float]) -> str:
    """In words."""
    return f"{statistics.median(values) * 1e3:.1f} ms"
