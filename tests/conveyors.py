"""Conveyors of tiny experts, by hand and in rehearsal."""

from collections.abc import Iterable

import numpy as np
import torch
from hypothesis import strategies as st

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.bay import Step
from raymoe.experts.call import LoadOrder, expert_id
from raymoe.experts.conveyor import Conveyor
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import Loader, ThreadLoader
from raymoe.experts.slots import Residency, SlotPool
from raymoe.types import ExpertKey, StepId
from tests.manual_loader import ManualLoader

LAYERS, EXPERTS = 3, 8
SEQUENCES = (1, 2, 3)
EXPERT_BYTES = 8  # two float32


def over(loader: Loader, slots: int) -> Conveyor:
    """A conveyor whose expert e of layer l holds the number that stands for both."""

    def read(key: ExpertKey) -> ExpertTensors:
        number = torch.full((1,), float(expert_id(key.layer, key.expert)))
        return {"up_proj": number, "down_proj": number}

    store = HostStore(read)
    store.load(ExpertKey(layer=layer, expert=expert) for layer in range(LAYERS) for expert in range(EXPERTS))
    pool = SlotPool({"up_proj": (1,), "down_proj": (1,)}, slots, torch.float32, torch.device("cpu"))
    conveyor = Conveyor(pool, Residency(slots, LAYERS, EXPERTS), loader, store, EXPERT_BYTES)
    loader.on_idle = conveyor.on_idle
    return conveyor


def make(slots: int, fails: Iterable[int] = ()) -> tuple[Conveyor, ManualLoader]:
    loader = ManualLoader(fails=set(fails))
    return over(loader, slots), loader


def step_id(position: int, sequence: int = 1) -> StepId:
    return StepId(sequence=sequence, position=position)


def order(
    conveyor: Conveyor, experts: list[int], position: int = 0, layer: int = 0, epoch: int = 0, sequence: int = 1
) -> None:
    named = np.array(experts, dtype=np.int32)
    conveyor.order(LoadOrder(step=step_id(position, sequence), epoch=epoch, layer=layer, experts=named))


def begin(conveyor: Conveyor, experts: list[int], layer: int = 0, step: StepId | None = None) -> Step:
    return conveyor.begin_step(layer, np.array(experts, dtype=np.int32), 1, None, step)


def deliver(conveyor: Conveyor, step: Step) -> list[float]:
    """What the slots held, ready ones first, when it was their turn to be computed; the call's end is left out."""
    ready = np.unique(step.slots_P[step.slots_P >= 0]).tolist()
    seen = [held(conveyor, slot) for slot in ready]
    conveyor.release(step, ready)
    while (arrived := conveyor.next_arrival(step)) is not None:
        identifier, slot = arrived
        assert held(conveyor, slot) == identifier
        seen.append(held(conveyor, slot))
        conveyor.release(step, [slot])
    return seen


def call(conveyor: Conveyor, experts: list[int], layer: int = 0, step: StepId | None = None) -> list[int]:
    """A whole layer call; returns the experts that were computed."""
    seen = deliver(conveyor, begin(conveyor, experts, layer, step))
    conveyor.end_step()
    return sorted(int(number) - expert_id(layer, 0) for number in seen)


def held(conveyor: Conveyor, slot: int) -> float:
    return conveyor.pool.slots[slot]["down_proj"].item()


def finish_all(conveyor: Conveyor, loader: ManualLoader) -> None:
    """Let every load that has begun end, and those that begin thereupon."""
    while running := loader.running():
        for ticket in running:
            ticket.finish()
        conveyor.on_idle()


def check_changes(conveyor: Conveyor, loader: ManualLoader, calls: Iterable[list[int]]) -> None:
    """What calls report of residency leads from what was in slots before them to what is there now."""
    mirror: set[int] = set()
    for position, experts in enumerate(calls):
        order(conveyor, [(expert + position) % EXPERTS for expert in experts], position=position + 1)
        finish_all(conveyor, loader)
        call(conveyor, experts, step=step_id(position))
        loaded, evicted, _ = conveyor.take_changes()
        mirror = mirror - set(evicted) | set(loaded)
        assert mirror == set(np.flatnonzero(conveyor.ready(0)))


experts_of_a_call = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=6)
events = st.one_of(
    st.tuples(
        st.just("order"),
        st.integers(1, 3),  # sequence
        st.integers(-1, 3),  # steps ahead
        st.integers(0, LAYERS - 1),
        st.integers(0, 2),  # epoch
        st.lists(st.integers(0, EXPERTS), max_size=5),
    ),
    st.tuples(st.just("call"), st.integers(0, 3), experts_of_a_call),
    st.tuples(st.just("break off"), st.integers(0, 3), experts_of_a_call),
    st.tuples(st.just("land"), st.integers(0, 30)),
    st.tuples(st.just("forget"), st.integers(1, 3)),
)


class Rehearsal:
    """Plays events against a conveyor, and checks after each what must always hold."""

    def __init__(self, conveyor: Conveyor, loader: ManualLoader | ThreadLoader, fails: Iterable[int] = ()) -> None:
        self.conveyor = conveyor
        self.loader = loader
        self.fails = set(fails)
        self.calls = dict.fromkeys(SEQUENCES, 0)  # per sequence; layers and positions follow

    def play(self, script: list[tuple]) -> None:
        """All events; then every sequence is forgotten, and loads under way end."""
        for event in script:
            self.take(event)
            self.check()
        for sequence in SEQUENCES:
            self.conveyor.forget(sequence)
        self.conveyor.end_step()
        if isinstance(self.loader, ManualLoader):
            finish_all(self.conveyor, self.loader)
        else:
            self.loader.close()
            self.conveyor.on_idle()

    def take(self, event: tuple) -> None:
        match event:
            case ("order", sequence, ahead, layer, epoch, experts):
                position = max(0, self.calls[sequence] // LAYERS + ahead)
                order(self.conveyor, experts, position, layer, epoch, sequence)
            case ("call" | "break off", sequence, experts):
                self.call(sequence, experts, event[0] == "call")
            case ("land", number):
                self.land(number)
            case ("forget", sequence):
                self.conveyor.forget(sequence)

    def land(self, number: int) -> None:
        """One load of those under way ends; on a thread they end by themselves."""
        if isinstance(self.loader, ManualLoader) and (running := self.loader.running()):
            running[number % len(running)].finish()
            self.conveyor.on_idle()

    def call(self, sequence: int, experts: list[int], to_the_end: bool) -> None:
        """A call of a sequence (0: of none) in its next layer, or the same once more, in pieces."""
        position, layer = divmod(self.calls.get(sequence, 0), LAYERS)
        step = step_id(position, sequence) if sequence else None
        if to_the_end:
            try:
                assert call(self.conveyor, experts, layer, step) == sorted(set(experts))
            except OSError:
                assert self.fails.intersection(expert_id(layer, expert) for expert in experts)
                self.conveyor.end_step()
        else:
            begin(self.conveyor, experts, layer, step)
        if sequence and experts[0] % 2:
            self.calls[sequence] += 1

    def check(self) -> None:
        residency = self.conveyor.residency
        assert len(self.conveyor.resident()) <= self.conveyor.pool.count
        assert len(set(residency.slot_of.values())) == len(residency.slot_of)
