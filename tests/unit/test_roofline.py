"""The floor that decode benchmarks hold their time per token against, and what they count for it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.cacheless.measure import WARM_STEPS, Answer, reading, roofline_fraction, saying, timed_from
from benchmarks.passes import resident_service
from benchmarks.roofline import active_bytes, floor_s, needed_bytes
from benchmarks.scheduling.setup import EmulatedLinkTimes
from benchmarks.scheduling.speed import LRU, RESIDENT, Measured, Timed
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.request import Chunk
from raymoe.types import Routing

EXPERT_BYTES = 100
CLUSTER: Any = SimpleNamespace(expert_bytes=EXPERT_BYTES, link_bytes_per_s=1000.0)


def test_the_longer_of_computing_and_moving_counts() -> None:
    assert floor_s(resident_s=0.2, moved_bytes=100, link_bytes_per_s=1000) == 0.2
    assert floor_s(resident_s=0.2, moved_bytes=400, link_bytes_per_s=1000) == 0.4


def test_without_links_only_computing_counts() -> None:
    assert floor_s(resident_s=0.2) == 0.2


def test_the_tokens_of_a_pass_share_its_floor() -> None:
    assert floor_s(resident_s=0.2, tokens_per_pass=2.5) == pytest.approx(0.08)
    assert floor_s(resident_s=0.2, moved_bytes=400, link_bytes_per_s=1000, tokens_per_pass=2) == 0.2


def test_loads_for_nothing_were_not_needed_and_neither_was_what_a_cache_held() -> None:
    assert needed_bytes(Routing(hits=3, misses=1, loads=6, bytes_loaded=600), EXPERT_BYTES) == 400
    assert needed_bytes(Routing(hits=3, misses=1, loads=2, bytes_loaded=200), EXPERT_BYTES) == 200


def test_a_pass_reads_the_trunk_and_its_distinct_experts() -> None:
    checkpoint = open_checkpoint(EMBEDDED_MODEL, "float32")
    expert_bytes = checkpoint.layers[0].expert_bytes(checkpoint.dtype)
    layers = len(checkpoint.layers)
    assert active_bytes(checkpoint, 0) <= checkpoint.trunk_bytes
    assert active_bytes(checkpoint) - active_bytes(checkpoint, 0) == layers * checkpoint.layers[0].top_k * expert_bytes
    assert active_bytes(checkpoint, 6.5) - active_bytes(checkpoint, 0) == layers * 6.5 * expert_bytes


def test_the_fraction_of_an_answer_is_of_its_own_loads() -> None:
    loads = Routing(hits=8, loads=8, bytes_loaded=800)
    answer = Answer(
        tpot_s=0.25, ttft_s=0.0, tokens=(), routing=Routing(), timed=loads, timed_passes=2, timed_tokens=4
    )  # a pass loads for 0.4 s and gives two tokens
    assert roofline_fraction(CLUSTER, answer, resident_s=0.1) == pytest.approx(0.8)
    assert roofline_fraction(CLUSTER, answer, resident_s=0.45) == pytest.approx(0.9)


def test_importance_holds_each_text_against_the_fastest_resident_one() -> None:
    measured = Measured(
        link=EmulatedLinkTimes(load_s=0.1, host_s=0.03),
        link_bytes_per_s=1000.0,
        loads_per_layer=1.0,
        by_name={
            LRU: Timed(tpot_s=[0.5, 0.4], moved_bytes=[400.0, 100.0]),
            RESIDENT: Timed(tpot_s=[0.3, 0.2], moved_bytes=[0.0, 0.0]),
        },
    )
    assert measured.roofline_fraction(LRU) == pytest.approx([0.8, 0.5])
    assert measured.roofline_fraction(RESIDENT) == pytest.approx([2 / 3, 1.0])


class OneLoad:
    """Expert calls of which every pass costs a load."""

    def take_cost(self) -> Routing:
        """As a scheduler has it."""
        return Routing(misses=1, loads=1, bytes_loaded=EXPERT_BYTES)


class Drafting:
    """A service whose passes give two tokens each and load one expert; its expert calls know nothing of drafts."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.experts = OneLoad()

    def stream(self, prompt: list[int], **options: Any) -> Iterator[Chunk]:
        """The prompt's pass gives one token."""
        self.experts.take_cost()
        yield Chunk(text="", token_ids=(0,))
        for number in range(self.passes):
            self.experts.take_cost()
            yield Chunk(text="", token_ids=(1,))
            if number + 1 < self.passes:
                yield Chunk(text="", token_ids=(2,))
        self.experts.take_cost()  # what is known only at the end
        whole = Routing(drafted=self.passes, accepted=self.passes)
        yield Chunk(text="", token_ids=(2,), finish_reason="length", routing=whole)


def test_only_timed_passes_count_and_drafts_are_the_requests() -> None:
    warm, timed = WARM_STEPS // 2, 5
    service: Any = Drafting(warm + timed)
    answer = saying([1], 1 + 2 * (warm + timed))(service)
    assert (answer.timed_passes, answer.timed_tokens) == (timed, 2 * timed)
    assert (answer.tokens_per_pass, answer.loaded_bytes) == (2.0, EXPERT_BYTES / 2)
    assert answer.timed.loads == timed
    assert answer.routing.acceptance == 1.0
    assert answer.routing.loads == warm + timed + 1  # without the prompt's


def test_timing_begins_with_a_whole_pass() -> None:
    times, taken_s = [0.0, 1.0, 3.1, 3.2, 3.3, 6.1, 6.2], [3.0, 6.0]
    assert [list(timed_from(times, place, taken_s)) for place in (1, 2, 4)] == [times[1:], times[4:], times[4:]]
    assert list(timed_from(times, 5, taken_s)) == [6.2], "no pass is left"


def test_text_and_speech_count_the_passes_that_they_time() -> None:
    service, close = resident_service()
    try:
        text = list(range(200, 216))
        answers = [reading(text, prefix=3)(service), saying(text[:3], 13)(service)]
    finally:
        close()
    chosen = len(service.checkpoint.layers) * service.checkpoint.layers[0].top_k
    for answer in answers:
        passes = 12 - WARM_STEPS
        assert (answer.timed_passes, answer.timed_tokens) == (passes, passes)
        assert answer.timed.hits + answer.timed.misses == passes * chosen
        assert answer.routing.hits + answer.routing.misses == 12 * chosen
