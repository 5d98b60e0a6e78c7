"""What the engine tells the shadow and when, and the book of plans that recall is counted from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from raymoe.config import PredictorConfig
from raymoe.engine.foresight import SETTLED_AFTER, Foresight, PlanBook, joined
from raymoe.model.kv import align, entries, unpack
from raymoe.model.runner import SequenceState
from raymoe.transport.shadow_messages import Begin, Draft, End, Plan, Token
from raymoe.types import Routing, SamplingRecipe, StepId
from tests.links import FakeLink

RECIPE = SamplingRecipe(
    seed=7, top_k=3, temperature=0.5, top_p=0.9, min_p=0.0, repetition_penalty=1.1, presence_penalty=0.0,
    frequency_penalty=0.0,
)  # fmt: skip
LAYERS, HEADS, WIDTH = 2, 1, 3


def step(position: int, sequence: int = 1) -> StepId:
    return StepId(sequence=sequence, position=position)


def plan(position: int, experts: Sequence[int], *, sequence: int = 1, layer: int = 0, epoch: int = 0) -> Plan:
    return Plan(
        step=step(position, sequence),
        epoch=epoch,
        layer=layer,
        experts_N=np.array(experts, dtype=np.int32),
        workers_N=np.zeros(len(experts), dtype=np.int32),
    )


def chosen(*experts: int) -> np.ndarray:
    """One token's experts."""
    return np.array([experts])


# --- the book -------------------------------------------------------------------------------------------


def test_a_plan_is_found_by_step_and_layer() -> None:
    book, mine = PlanBook(), plan(5, [1, 2])
    book.put(mine)
    assert book.plan(step(5), 0) is mine
    assert book.plan(step(5), 1) is book.plan(step(6), 0) is book.plan(step(5, sequence=2), 0) is None


def test_the_lead_is_the_time_from_the_first_plan_to_its_layer() -> None:
    times = iter([1.0, 2.0, 4.5])
    book = PlanBook(clock=lambda: next(times))
    book.put(plan(5, [1]))
    book.put(plan(5, [2], epoch=1))
    book.needed(step(5), 0, chosen(1))
    book.needed(step(5), 1, chosen(1))
    assert (book.lead_s, book.led) == (3.5, 1)


@pytest.mark.parametrize(("first", "second", "stays"), [(0, 1, 1), (1, 0, 1), (2, 2, 2)])
def test_the_later_epoch_stays_and_of_one_epoch_the_last(first: int, second: int, stays: int) -> None:
    book = PlanBook()
    book.put(plan(5, [1], epoch=first))
    book.put(plan(5, [2], epoch=second))
    kept = book.plan(step(5), 0)
    assert kept is not None and kept.epoch == stays
    assert kept.experts_N.tolist() == ([1] if first > second else [2])


def test_recall_is_the_share_of_needed_experts_that_were_named() -> None:
    book = PlanBook()
    book.put(plan(5, [1, 2, 3], layer=0))
    book.needed(step(5), 0, np.array([[1, 9], [3, 2]]))
    book.needed(step(5), 1, chosen(4, 5))
    book.settle(1, 6)
    told = book.take()
    assert (told.foretold, told.foretellable) == (3, 6)
    assert told.recall == 0.5


def test_what_was_taken_is_not_counted_again() -> None:
    book = PlanBook()
    book.needed(step(5), 0, chosen(1))
    book.settle(1, 6)
    assert book.take().foretellable == 1
    book.settle(1, 100)
    assert book.take() == Routing()


def test_a_late_plan_counts_as_long_as_its_step_is_not_settled() -> None:
    book = PlanBook()
    book.needed(step(5), 0, chosen(1))
    book.settle(1, 5)
    book.put(plan(5, [1]))
    book.settle(1, 6)
    book.put(plan(5, [1]))
    assert (book.take().foretold, book.take().foretellable) == (1, 0)


def test_only_the_named_sequence_is_settled_or_forgotten() -> None:
    book = PlanBook()
    for sequence in (1, 2):
        book.put(plan(5, [1], sequence=sequence))
        book.needed(step(5, sequence), 0, chosen(1))
    book.settle(1, 6)
    assert book.take().foretold == 1
    assert book.plan(step(5, 1), 0) is None and book.plan(step(5, 2), 0) is not None
    book.forget(2)
    assert book.plan(step(5, 2), 0) is None
    book.settle(2, 6)
    assert (book.take().foretold, book.take().foretellable) == (0, 0)


def test_what_was_forgotten_was_needed_all_the_same() -> None:
    book = PlanBook()
    book.put(plan(5, [1], epoch=7))
    book.needed(step(5), 0, chosen(1))
    book.forget(1)
    book.put(plan(5, [1], epoch=0))
    book.settle(1, 6)
    assert book.take().recall == 1.0, "a lower epoch of another shadow counts"


def test_plans_of_one_pass_add_up_and_a_later_epochs_stands_alone() -> None:
    book = PlanBook()
    for experts in ([1, 2], [2, 3], [1]):
        book.add(plan(5, experts))
    kept = book.plan(step(5), 0)
    assert kept is not None and kept.experts_N.tolist() == [1, 2, 3]
    book.needed(step(5), 0, np.array([[1, 9], [3, 2]]))
    book.settle(1, 6)
    assert book.take().recall == 0.75
    book.add(plan(7, [1], epoch=1))
    book.add(plan(7, [2], epoch=0))
    book.add(plan(7, [4], epoch=2))
    kept = book.plan(step(7), 0)
    assert kept is not None and kept.experts_N.tolist() == [4]


pairs = st.dictionaries(st.integers(0, 7), st.integers(0, 3), max_size=6)


@given(pairs, pairs)
def test_joined_plans_name_each_expert_once_where_the_first_has_it(
    first: dict[int, int], second: dict[int, int]
) -> None:
    def plan_of(workers: dict[int, int]) -> Plan:
        named = plan(5, list(workers))
        return Plan(
            step=named.step, epoch=0, layer=0, experts_N=named.experts_N,
            workers_N=np.array(list(workers.values()), dtype=np.int32),
        )  # fmt: skip

    both = joined(plan_of(first), plan_of(second))
    assert len(both.experts_N) == len(first | second)
    assert dict(zip(both.experts_N.tolist(), both.workers_N.tolist(), strict=True)) == second | first


positions = st.integers(0, 8)


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "needed", "settle", "forget"]), st.integers(1, 2), positions), max_size=40
    )
)
def test_settling_everything_leaves_nothing_and_counts_each_need_once(acts: list[tuple[str, int, int]]) -> None:
    book, open_needs, settled = PlanBook(), set(), 0
    for act, sequence, position in acts:
        if act == "put":
            book.put(plan(position, [1], sequence=sequence))
        elif act == "needed":
            book.needed(step(position, sequence), 0, chosen(1, 2))
            open_needs.add((sequence, position))
        elif act == "settle":
            book.settle(sequence, position)
            done = {need for need in open_needs if need[0] == sequence and need[1] < position}
            settled, open_needs = settled + len(done), open_needs - done
        else:
            book.forget(sequence)
    for sequence in (1, 2):
        book.settle(sequence, 100)
    told = book.take()
    assert told.foretellable == 2 * (settled + len(open_needs))
    assert 0 <= told.foretold <= told.foretellable / 2
    assert not book._plans and not book._needed


# --- what is told ---------------------------------------------------------------------------------------


class Decoding:
    """A sequence of the model: every position's keys and values are its number."""

    def __init__(self, prompt: int, *, cached: bool = True) -> None:
        self.cache = DynamicCache()
        self.length = 0
        self.read(prompt)
        self.state = SequenceState(torch.empty(0), {"past_key_values": self.cache} if cached else {}, prompt)

    def read(self, count: int = 1) -> None:
        numbers = torch.arange(self.length, self.length + count, dtype=torch.float32)
        grown = numbers.view(1, 1, count, 1).expand(1, HEADS, count, WIDTH).clone()
        for layer in range(LAYERS):
            self.cache.update(grown + 100 * layer, grown + 100 * layer + 50, layer)
        self.length += count


def follow(foresight: Foresight, model: Decoding, tokens: Sequence[int], sequence: int = 1) -> None:
    """Read tokens as the engine does."""
    for token in tokens:
        foresight.read(sequence, token, model.state)
        model.read()


def foresight_of(link: FakeLink | None = None, **config: Any) -> Foresight:
    return Foresight(PredictorConfig(**config), link)


def spans(link: FakeLink) -> list[tuple[int, int, int]]:
    """(position, start, count) of every token that was told."""
    return [(news.step.position, news.start, news.count) for news in link.told if isinstance(news, Token)]


EVERY_STEP = [(3, 0, 0), (4, 3, 1), (5, 4, 1), (6, 5, 1), (7, 6, 1), (8, 7, 1), (9, 8, 1)]
EVERY_THIRD = [(3, 0, 0), (4, 0, 0), (5, 0, 0), (6, 3, 3), (7, 0, 0), (8, 0, 0), (9, 6, 3)]
NEVER = [(position, 0, 0) for position in range(3, 10)]


@pytest.mark.parametrize(("every", "expected"), [(0, NEVER), (1, EVERY_STEP), (3, EVERY_THIRD)])
def test_keys_and_values_go_out_when_they_are_due(every: int, expected: list[tuple[int, int, int]]) -> None:
    link = FakeLink()
    foresight = foresight_of(link, kv_align_every=every)
    foresight.begin(1, [10, 11, 12])
    follow(foresight, Decoding(3), range(20, 27))
    assert link.told[0] == Begin(sequence=1, tokens=(10, 11, 12))
    assert [news.token for news in link.told if isinstance(news, Token)] == list(range(20, 27))
    assert spans(link) == expected


def test_the_entries_are_those_of_the_models_cache() -> None:
    link = FakeLink()
    foresight, model = foresight_of(link, kv_align_every=3), Decoding(3)
    foresight.begin(1, [10, 11, 12])
    follow(foresight, model, range(20, 24))
    last = link.told[-1]
    assert isinstance(last, Token) and last.dtype == torch.float32
    sent = unpack(last.entries, last.count, last.dtype)
    assert torch.equal(sent.flat, entries(model.cache, 3, 6).flat)
    shadows = Decoding(6).cache
    shadows.layers[0].keys.zero_()
    assert align(shadows, 3, sent)
    assert shadows.layers[0].keys[0, 0, :, 0].tolist() == [0.0, 0.0, 0.0, 3.0, 4.0, 5.0]


def test_a_model_without_a_cache_tells_tokens_alone() -> None:
    link = FakeLink()
    foresight = foresight_of(link)
    foresight.begin(1, [10, 11, 12])
    follow(foresight, Decoding(3, cached=False), [20, 21, 22])
    assert spans(link) == [(3, 0, 0), (4, 0, 0), (5, 0, 0)]


def test_the_step_is_that_of_the_token_about_to_be_read() -> None:
    foresight, model = foresight_of(FakeLink()), Decoding(3)
    foresight.begin(1, [10, 11, 12])
    assert foresight.plan(0) is None
    follow(foresight, model, [20, 21])
    assert foresight.step == step(4)
    foresight.end(1)
    assert foresight.step is None and foresight.plan(0) is None


def test_plans_are_booked_and_told_as_they_come() -> None:
    link, seen = FakeLink(), []
    foresight = foresight_of(link)
    foresight.on_plan = seen.append
    foresight.begin(1, [10, 11, 12])
    follow(foresight, Decoding(3), [20])
    assert foresight.plan(0) is None
    mine, next_one = plan(3, [1]), plan(4, [2])
    link.coming = [mine, next_one]
    assert foresight.plan(0) is mine
    assert seen == [mine, next_one]


def test_steps_are_settled_once_the_shadow_can_say_no_more_of_them() -> None:
    link = FakeLink()
    foresight, model = foresight_of(link), Decoding(3)
    foresight.begin(1, [10, 11, 12])
    for position in range(3, 3 + SETTLED_AFTER + 2):
        follow(foresight, model, [20])
        foresight.routed(0, chosen(position, 99))
        assert foresight.book.take().foretellable == (2 if position > 3 + SETTLED_AFTER else 0)
        link.coming = [plan(position, [position])]
        assert foresight.plan(0) is not None
    foresight.end(1)
    told = foresight.book.take()
    assert (told.foretold, told.foretellable) == (SETTLED_AFTER + 1, 2 * (SETTLED_AFTER + 1))


def test_what_comes_at_the_end_still_counts() -> None:
    link = FakeLink()
    foresight = foresight_of(link)
    foresight.begin(1, [10])
    follow(foresight, Decoding(1), [20])
    foresight.routed(0, chosen(1, 2))
    link.coming = [plan(1, [1, 2])]
    foresight.end(1)
    assert foresight.book.take().recall == 1.0
    assert link.told[-1] == End(sequence=1)


def test_a_prompt_is_not_foretold() -> None:
    foresight = foresight_of(FakeLink())
    foresight.begin(1, [10, 11])
    foresight.routed(0, np.array([[1, 2], [3, 4]]))
    assert foresight.plan(0) is None
    foresight.end(1)
    assert foresight.book.take() == Routing()


# --- drafts -----------------------------------------------------------------------------------------------


def draft(position: int, token: int, *, epoch: int = 0, sequence: int = 1) -> Draft:
    return Draft(step=step(position, sequence), epoch=epoch, token=token)


def test_guesses_are_offered_where_the_token_was_guessed_too() -> None:
    link = FakeLink()
    foresight = foresight_of(link)
    foresight.begin(1, [10, 11])
    link.coming = [draft(2, 20), draft(3, 21), draft(4, 22)]
    assert foresight.guesses(1, 20, 8) == ([21, 22], True)
    link.coming = [draft(2, 20), draft(3, 21)]
    assert foresight.guesses(1, 99, 8) == ([], False)
    assert foresight.guesses(1, 99, 8) == ([], None)
    assert foresight.guesses(7, 20, 8) == ([], None), "a sequence that never began"


def test_a_pass_is_told_with_the_drafts_it_reads_and_keys_and_values_of_all_that_were_accepted() -> None:
    link = FakeLink()
    foresight, model = foresight_of(link), Decoding(2)
    foresight.coming = 3
    foresight.begin(1, [10, 11])
    foresight.coming = 2
    foresight.reads(1, [21, 22])
    follow(foresight, model, [20])
    model.read(2)
    foresight.accept(1, [21, 22])
    foresight.reads(1, [])
    foresight.coming = 1
    follow(foresight, model, [23])
    begun, first, second = link.told
    assert isinstance(begun, Begin) and begun.coming == 3
    assert isinstance(first, Token) and (first.drafts, first.coming, first.count) == (2, 2, 0)
    assert isinstance(second, Token) and (second.drafts, second.coming) == (0, 1)
    assert (second.step.position, second.start, second.count) == (5, 2, 3)
    sent = unpack(second.entries, second.count, second.dtype)
    assert torch.equal(sent.flat, entries(model.cache, 2, 5).flat)
    assert foresight.step == step(5)


@pytest.mark.parametrize("every", [1, 2, 3, 4])
@given(held=st.lists(st.integers(0, 4), max_size=12))
def test_entries_of_passes_of_any_length_are_sent_once_and_never_later_than_due(every: int, held: list[int]) -> None:
    link = FakeLink()
    foresight, model = foresight_of(link, kv_align_every=every), Decoding(2)
    foresight.begin(1, [10, 11])
    for count in held:
        follow(foresight, model, [20])
        model.read(count)
        foresight.accept(1, [21] * count)
    sent = 2
    for position, start, count in spans(link):
        assert start == (sent if count else 0)
        sent += count
        assert position - sent < every


def test_another_shadow_hears_of_accepted_drafts_as_of_all_other_tokens() -> None:
    link = FakeLink()
    foresight, model = foresight_of(link), Decoding(1)
    foresight.begin(1, [10], RECIPE)
    follow(foresight, model, [20])
    foresight.accept(1, [21, 22])
    link.moves += 1
    assert foresight.guesses(1, 23, 8) == ([], None)
    link.told.clear()
    follow(foresight, model, [23])
    assert link.told == [Begin(sequence=1, tokens=(10, 20, 21, 22, 23), recipe=RECIPE, first=4)]


def test_drafts_of_another_sequence_or_of_one_that_has_ended_are_no_ones() -> None:
    link = FakeLink()
    foresight = foresight_of(link)
    for sequence in (1, 2):
        foresight.begin(sequence, [10])
    foresight.end(2)
    link.coming = [draft(1, 20), draft(2, 21, sequence=2), draft(2, 31)]
    assert foresight.guesses(1, 20, 8) == ([31], True)


# --- another shadow -------------------------------------------------------------------------------------


def test_another_shadow_is_given_all_tokens_so_far() -> None:
    link, anew = FakeLink(), []
    foresight, model = foresight_of(link), Decoding(3)
    foresight.on_anew = anew.append
    foresight.begin(1, [10, 11, 12])
    follow(foresight, model, [20, 21])
    assert anew == []
    link.moves += 1
    link.told.clear()
    follow(foresight, model, [22, 23, 24])
    assert anew == [1]
    assert link.told[0] == Begin(sequence=1, tokens=(10, 11, 12, 20, 21, 22), first=3)
    assert spans(link) == [(6, 0, 0), (7, 6, 1)], "from then on, periods count from there"


def test_the_plans_of_the_shadow_before_are_void_whatever_their_epoch() -> None:
    link = FakeLink()
    foresight, model = foresight_of(link), Decoding(1)
    foresight.begin(1, [10])
    link.coming = [plan(2, [7], epoch=5)]
    follow(foresight, model, [20])
    assert foresight.plan(0) is None
    link.moves += 1
    follow(foresight, model, [21])
    assert foresight.plan(0) is None
    link.coming = [plan(2, [8], epoch=0)]
    found = foresight.plan(0)
    assert found is not None and found.experts_N.tolist() == [8]


def test_every_sequence_is_begun_anew() -> None:
    link = FakeLink()
    foresight = foresight_of(link)
    for sequence in (1, 2):
        foresight.begin(sequence, [sequence])
    link.moves += 1
    link.told.clear()
    for sequence in (1, 2):
        follow(foresight, Decoding(1), [20], sequence)
    assert link.told == [Begin(sequence=n, tokens=(n, 20), first=1) for n in (1, 2)]


def test_a_recipe_is_told_with_the_number_of_the_next_token() -> None:
    link, recipe = FakeLink(), RECIPE
    foresight, model = foresight_of(link), Decoding(2)
    foresight.begin(1, [10, 11], recipe)
    assert link.told == [Begin(sequence=1, tokens=(10, 11), recipe=recipe, first=0)]
    follow(foresight, model, [20, 21])
    for reads, tokens in ((3, (10, 11, 20, 21, 22)), (4, (10, 11, 20, 21, 22, 23))):
        link.moves += 1
        link.told.clear()
        follow(foresight, model, [19 + reads])
        assert link.told == [Begin(sequence=1, tokens=tokens, recipe=recipe, first=reads)]


# --- the ends of it -------------------------------------------------------------------------------------


def test_without_a_predictor_nothing_is_booked() -> None:
    foresight = Foresight()
    foresight.begin(1, [10])
    follow(foresight, Decoding(1), [20, 21])
    foresight.routed(0, chosen(1))
    assert foresight.plan(0) is None
    foresight.end(1)
    assert foresight.book.take() == Routing()


def test_without_a_link_plans_of_this_process_are_found() -> None:
    foresight, mine = foresight_of(kind="gate"), plan(1, [1])
    foresight.begin(1, [10])
    follow(foresight, Decoding(1), [20])
    foresight.book.put(mine)
    assert foresight.plan(0) is mine


def test_sequences_that_never_began_are_ignored() -> None:
    link = FakeLink()
    foresight = foresight_of(link)
    follow(foresight, Decoding(1), [20])
    foresight.end(5)
    assert link.told == [] and foresight.step is None


def test_the_prompt_that_was_given_stays_as_it_is() -> None:
    foresight, prompt = foresight_of(FakeLink()), [10, 11]
    foresight.begin(1, prompt)
    follow(foresight, Decoding(2), [20])
    assert prompt == [10, 11]


def test_plans_that_come_after_the_end_are_not_kept() -> None:
    link = FakeLink()
    foresight = foresight_of(link)
    foresight.begin(1, [10])
    follow(foresight, Decoding(1), [20])
    foresight.end(1)
    foresight.begin(2, [10])
    link.coming = [plan(2, [1], sequence=1), plan(1, [1], sequence=2)]
    follow(foresight, Decoding(1), [20], sequence=2)
    assert foresight.plan(0) is not None
    foresight.end(2)
    assert not foresight.book._plans
