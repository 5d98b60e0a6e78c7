"""Passes that make several tokens: stops, limits, cancelling and penalties are as if each token had its own pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from raymoe.config import SchedulingConfig, TrunkConfig
from raymoe.engine.drafting import Drafting
from raymoe.engine.engine import Engine
from raymoe.engine.request import Chunk, SamplingParams
from raymoe.engine.sampling import Sampler, SamplingDefaults
from raymoe.model.runner import SequenceState, Trial
from raymoe.types import Routing

VOCABULARY = 32


def logits_of(tokens: Sequence[int]) -> torch.Tensor:
    """A model that looks at its last two tokens."""
    generator = torch.Generator().manual_seed(sum(31**place * token for place, token in enumerate(tokens[-2:])))
    return 2.0 * torch.randn(VOCABULARY, generator=generator)


@dataclass
class FakeRunner:
    """Reads tokens, and checks that what was read and not kept is gone."""

    passes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def prefill(self, prompt: list[int]) -> tuple[torch.Tensor, SequenceState]:
        self.tokens = list(prompt)
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, len(prompt), 1), torch.zeros(1, 1, len(prompt), 1), 0)
        return logits_of(prompt), SequenceState(torch.empty(0), {"past_key_values": cache}, len(prompt))

    def decode(self, state: SequenceState, token: int) -> torch.Tensor:
        self.passes.append(1)
        self.tokens.append(token)
        state.length += 1
        return logits_of(self.tokens)

    def read(self, state: SequenceState, tokens: list[int]) -> Trial:
        self.passes.append(len(tokens))
        rows = [logits_of([*self.tokens, *tokens[: place + 1]]) for place in range(len(tokens))]
        return Trial(logits_TV=torch.stack(rows), tokens=torch.tensor([tokens]), outputs=None)

    def keep(self, state: SequenceState, trial: Trial, count: int) -> None:
        self.tokens += trial.tokens[0, :count].tolist()
        state.length += count


@dataclass
class FakeScheduler:
    """Notes which tokens the model was said to read."""

    alpha: float = 0.0
    read_tokens: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def begin(self, sequence: int, prompt: Sequence[int], recipe: Any = None) -> None: ...

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        self.read_tokens.append(token)

    def end(self, sequence: int) -> None:
        self.ended.append(sequence)

    def take_cost(self) -> Routing:
        return Routing(hits=1)

    def reconfigure(self, scheduling: SchedulingConfig) -> None: ...


@dataclass
class Oracle:
    """A shadow that guesses by the model's own rule, wrongly where ``wrong`` says so, by the guess's number."""

    params: SamplingParams
    wrong: list[bool]
    prompt: list[int]
    coming: int = 0
    answer: list[int] = field(default_factory=list)
    made: int = 0

    def guesses(self, sequence: int, token: int, most: int) -> tuple[list[int], bool | None]:
        self.answer.append(token)
        sampler, found = Sampler(self.params, SamplingDefaults()), list[int]()
        for _ in range(most):
            answer = self.answer + found
            guess, _ = sampler.choose(logits_of(self.prompt + answer), self.prompt, answer, len(answer))
            lies = bool(self.wrong) and self.wrong[self.made % len(self.wrong)]
            self.made += 1
            found.append((guess + lies) % VOCABULARY)
        return found, None

    def reads(self, sequence: int, drafts: Sequence[int]) -> None: ...

    def accept(self, sequence: int, tokens: Sequence[int]) -> None:
        self.answer += tokens


class Letters:
    """A tokenizer of letters."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token % 26) for token in token_ids)


@dataclass
class Run:
    """A request that was played to its end."""

    chunks: list[Chunk]
    runner: FakeRunner
    scheduler: FakeScheduler

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def told(self) -> list[tuple[str, tuple[int, ...], tuple[Any, ...], str | None]]:
        """All that a client sees, but for what it cost."""
        return [(chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason) for chunk in self.chunks]


PROMPT = [3, 1, 4]


def play(
    params: SamplingParams,
    wrong: list[bool] | None,
    cancel_after: int | None = None,
    defaults: SamplingDefaults | None = None,
) -> Run:
    """Run a request with drafts, or without any where ``wrong`` is None."""
    runner, scheduler, chunks = FakeRunner(), FakeScheduler(), list[Any]()
    known = replace(params, grammar=None, logit_bias={})  # a shadow hears of neither
    oracle = Oracle(known, wrong or [], PROMPT)
    engine = Engine(
        runner,  # type: ignore[arg-type]
        scheduler,
        TrunkConfig(),
        SchedulingConfig(),
        tokenizer=Letters(),
        defaults=defaults or SamplingDefaults(),
        end_tokens=frozenset({7}),
        context=None,
        vocabulary=VOCABULARY,
        max_output_tokens=64,
        drafting=None if wrong is None else Drafting(oracle, 4, VOCABULARY),
    )

    def hear(chunk: Any) -> None:
        chunks.append(chunk)
        if len(chunks) == cancel_after:
            engine.cancel(request)

    request = engine.submit(PROMPT, params, hear)
    while engine.step():
        pass
    assert not any(isinstance(chunk, BaseException) for chunk in chunks), chunks
    assert scheduler.ended == [request]
    return Run(chunks, runner, scheduler)


requests = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 5),
    stop=st.sampled_from([(), ("a",), ("ab", "cde"), ("xyz",)]),
    ignore_eos=st.booleans(),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([None, 1.2]),
    logprobs=st.sampled_from([None, 2]),
)


@settings(max_examples=60)
@given(requests, st.lists(st.booleans(), max_size=12))
def test_a_client_sees_what_it_sees_without_drafts(params: SamplingParams, wrong: list[bool]) -> None:
    plain, drafted = play(params, None), play(params, wrong)
    assert drafted.told == plain.told
    last = drafted.chunks[-1]
    assert last.usage == plain.chunks[-1].usage
    assert last.routing is not None and 0 <= last.routing.accepted <= last.routing.drafted


class Alternating:
    """A grammar: even and odd tokens in turns. Its state refuses to hear of tokens that were not chosen."""

    vocabulary = VOCABULARY

    def __init__(self) -> None:
        self.heard: list[int] = []

    def begin(self, grammar: str) -> "Alternating":
        return Alternating()

    def allowed_V(self, answer: list[int], vocabulary: int) -> torch.Tensor:
        assert answer[: len(self.heard)] == self.heard
        self.heard = list(answer)
        return torch.arange(vocabulary) % 2 == len(answer) % 2


@settings(max_examples=40)
@given(st.integers(0, 50), st.sampled_from([0.0, 1.0]), st.lists(st.booleans(), max_size=12))
def test_grammars_and_biases_are_followed_over_drafts(seed: int, temperature: float, wrong: list[bool]) -> None:
    params = SamplingParams(
        max_tokens=24, temperature=temperature, seed=seed, grammar="in turns", logit_bias={4: -100, 7: -100, 9: 3}
    )
    by_grammar = SamplingDefaults(grammars=Alternating())  # type: ignore[arg-type]
    plain, drafted = (play(params, lies, defaults=by_grammar) for lies in (None, wrong))
    assert drafted.told == plain.told
    assert [token % 2 for token in drafted.tokens] == [0, 1] * 12
    assert not {4, 7} & set(drafted.tokens)


def test_right_guesses_save_passes_and_wrong_ones_cost_none() -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    plain, right, wrong = play(params, None), play(params, [False]), play(params, [True])
    assert len(plain.runner.passes) == 39
    assert len(right.runner.passes) < 20
    assert len(wrong.runner.passes) == 39
    routing = right.chunks[-1].routing
    assert routing is not None and routing.accepted == routing.drafted > 20
    assert routing.acceptance == 1.0
    lied = wrong.chunks[-1].routing
    assert lied is not None and lied.accepted == 0


def test_a_pass_reads_no_further_than_the_answer_may_go() -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    run = play(params, [False])
    assert len(run.tokens) == 4 and sum(run.runner.passes) == 3
    assert play(SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True), [False]).runner.passes == []


@pytest.mark.parametrize("after", range(1, 12))
def test_cancelling_within_a_pass_ends_it_at_once(after: int) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    plain, drafted = play(params, None, after), play(params, [False], after)
    assert len(drafted.tokens) == after
    assert drafted.told == plain.told
    assert drafted.chunks[-1].finish_reason == "cancelled"


def test_the_scheduler_is_told_of_each_passes_first_token() -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    run = play(params, [False, False, True])
    starts, place = [], 0
    for token in run.scheduler.read_tokens:
        place = run.tokens.index(token, place)
        starts.append(place)
    assert len(starts) == len(run.runner.passes) < 19
