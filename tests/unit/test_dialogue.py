"""What host and device tell each other arrives whole, whatever the order of writes."""

import numpy as np
import torch

from benchmarks.device.played import share
from raymoe.engine.dialogue import CLOSED, OPEN, Dialogue, Words

TOP_K, HIDDEN = 2, 5


def dialogue() -> Dialogue:
    talk = Dialogue(share, Words(TOP_K, logits=3, state=HIDDEN))
    talk.words = Words(TOP_K, logits=3)
    return talk


def test_it_is_heard_when_the_last_word_of_any_order_has_come() -> None:
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 6, 0, 1, 5, 2, 4]):
        talk = dialogue()
        for place in order:
            assert not talk.heard()
            talk.there[place] = torch.nan if place % 2 else 0.0  # a broken model's words are words too
        assert talk.heard()
        talk.forget()
        assert not talk.heard()


def test_answers_are_words_of_the_turn_and_the_value() -> None:
    talk, sums = dialogue(), np.array([1.5, -2.0, 0.0, -0.0, 1e-30], dtype=np.float32)
    slots, weights = np.array([7, -1], dtype=np.int32), np.array([0.25, 0.75], dtype=np.float32)
    talk.answer(9, slots, weights, sums)
    for words in (talk.decided, talk.sums):
        assert (words >> 32).tolist() == [9] * len(words)
    values = talk.decided.to(torch.int32)
    assert values[:TOP_K].tolist() == [7, -1]
    assert values[TOP_K:].view(torch.float32).tolist() == weights.tolist()
    assert talk.sums.to(torch.int32).view(torch.float32).tolist() == sums.tolist()


def test_passing_gives_the_first_slot_no_weight() -> None:
    talk = dialogue()
    for turn in (OPEN, CLOSED):
        talk.pass_all(turn)
        assert (talk.decided >> 32).tolist() == [turn] * 2 * TOP_K
        assert talk.decided.to(torch.int32).tolist() == [0] * 2 * TOP_K
    assert CLOSED < 1 < OPEN, "turns are counted from 1"


def test_words_are_found_where_they_were_told() -> None:
    told = np.array([[3, 1, 0.75, 0.25, 10, 11, 12, 20, 21, 30, 31]] * 2, dtype=np.float32)
    words = Words(TOP_K, logits=3, coming=2, state=2)
    assert words.total == told.shape[1]
    experts, weights = words.chosen(told[0])
    assert experts.tolist() == [3, 1] and experts.dtype == np.int32 and weights.tolist() == [0.75, 0.25]
    of_many = (*words.chosen(told), words.router_logits(told), words.forecast(told), words.row(told))
    assert [part[1].tolist() for part in of_many if part is not None] == [
        [3, 1],
        [0.75, 0.25],
        [10, 11, 12],
        [20, 21],
        [30, 31],
    ]
    bare = Words(TOP_K)
    assert [bare.router_logits(told), bare.forecast(told), bare.row(told)] == [None] * 3
