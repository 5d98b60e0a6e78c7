"""What the dispatcher knows of workers elsewhere: which experts they hold ready, and how long a load takes them."""

from collections.abc import Collection, Container
from dataclasses import dataclass, field

import numpy as np
import torch

from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.holdings import Changes
from raymoe.experts.call import ExpertAnswer, ExpertCall, expert_id
from raymoe.placement.assignment import Fleet
from raymoe.transport.client import Received
from raymoe.types import DeviceName, ExpertKey, LayerSize

NEAR, FAR = DeviceName("near"), DeviceName("far")
EXPERTS = 6
SIZES = (LayerSize(experts=EXPERTS, expert_bytes=8, top_k=2),) * 2
OWNERS = {
    ExpertKey(layer=layer, expert=expert): NEAR if expert < 3 else FAR
    for layer in range(len(SIZES))
    for expert in range(EXPERTS)
}


@dataclass
class Remote:
    """Answers every call at once, with what it is told to tell."""

    tells: dict[DeviceName, dict] = field(default_factory=dict)
    sent: dict[int, tuple[DeviceName, ExpertCall]] = field(default_factory=dict)
    late_answers: int = 0

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        self.sent[len(self.sent)] = (device, call)
        return len(self.sent) - 1

    def receive(self, wait_s: float, awaited: Container[int]) -> list[Received]:
        return [
            Received(
                request=number,
                answer=ExpertAnswer(output_PH=torch.zeros(len(call.experts_P), 4), **self.tells.get(name, {})),
            )
            for number, (name, call) in self.sent.items()
            if number in awaited
        ]


def dispatcher(remote: Remote, bounded: Collection[DeviceName], told: list[Changes] | None = None) -> Dispatcher:
    on_changes = told.append if told is not None else None
    return Dispatcher(SIZES, OWNERS, local={}, remote=remote, timeout_s=1.0, bounded=bounded, on_changes=on_changes)


def ask(made: Dispatcher, layer: int, *experts: int) -> None:
    made.compute(layer, torch.zeros(1, 4), torch.tensor([experts]))


def available(made: Dispatcher, layer: int) -> list[int]:
    return np.flatnonzero(made.available(layer)).tolist()


def test_devices_without_slots_hold_everything_ready() -> None:
    made = dispatcher(Remote(), bounded=())
    assert available(made, 0) == [0, 1, 2, 3, 4, 5]


def test_a_bounded_device_holds_nothing_until_it_says_so() -> None:
    assert available(dispatcher(Remote(), bounded={FAR}), 0) == [0, 1, 2]


def test_residency_follows_the_answers() -> None:
    remote = Remote(tells={FAR: {"loaded": (expert_id(0, 4), expert_id(1, 5))}})
    made = dispatcher(remote, bounded={FAR})
    ask(made, 0, 1, 4)
    assert (available(made, 0), available(made, 1)) == ([0, 1, 2, 4], [0, 1, 2, 5])
    remote.tells[FAR] = {"evicted": (expert_id(0, 4),)}
    ask(made, 1, 0, 5)
    assert (available(made, 0), available(made, 1)) == ([0, 1, 2], [0, 1, 2, 5])


def test_a_new_engine_knows_what_old_workers_hold() -> None:
    made = dispatcher(Remote(), bounded={FAR})
    made.assume_resident(FAR, [expert_id(0, 3), expert_id(1, 4)])
    assert (available(made, 0), available(made, 1)) == ([0, 1, 2, 3], [0, 1, 2, 4])


def test_another_owners_copy_does_not_count() -> None:
    made = dispatcher(Remote(), bounded={NEAR, FAR})
    made.assume_resident(FAR, [expert_id(0, 0), expert_id(0, 3)])
    assert available(made, 0) == [3]


def test_what_is_assumed_of_a_device_that_holds_everything_or_of_no_device_changes_nothing() -> None:
    made = dispatcher(Remote(), bounded={FAR})
    made.assume_resident(NEAR, [expert_id(0, 5)])
    made.assume_resident(DeviceName("gone"), [expert_id(0, 5)])
    assert available(made, 0) == [0, 1, 2]


def test_the_slowest_device_says_how_long_a_load_takes() -> None:
    remote = Remote(tells={NEAR: {"loaded": (0,), "load_s": 0.002}, FAR: {"loaded": (3,), "load_s": 0.005}})
    made = dispatcher(remote, bounded={NEAR, FAR})
    assert made.load_s() is None
    ask(made, 0, 0, 1)
    assert made.load_s() == 0.002
    ask(made, 0, 0, 3)
    assert made.load_s() == 0.005
    remote.tells[FAR] = {}  # nothing came or went, so nothing was measured
    ask(made, 0, 0, 3)
    assert made.load_s() == 0.005


def test_changes_are_told_with_the_cost() -> None:
    told: list[Changes] = []
    remote = Remote(tells={FAR: {"loaded": (expert_id(0, 4),), "hits": 1, "misses": 1, "loads": 1, "hosted": 1}})
    made = dispatcher(remote, {FAR}, told)
    ask(made, 0, 3, 4)
    cost = made.take_cost()
    assert (cost.hits, cost.misses, cost.loads, cost.hosted, cost.calls) == (1, 1, 1, 1, 1)
    assert told == [{FAR: ([expert_id(0, 4)], [])}]


def test_scores_go_along_with_every_call() -> None:
    remote = Remote()
    scores = np.linspace(0, 1, EXPERTS, dtype=np.float32)
    dispatcher(remote, ()).compute(0, torch.zeros(1, 4), torch.tensor([[0, 3]]), scores)
    assert {name: call.scores_E is scores for name, call in remote.sent.values()} == {NEAR: True, FAR: True}


# --- a fleet --------------------------------------------------------------------------------------------


def of_fleet(remote: Remote, bounded: Collection[DeviceName]) -> Dispatcher:
    """Both own everything of layer 0; of layer 1 each what it owns first."""
    everything = np.ones((2, EXPERTS), dtype=bool)
    halves = np.array([[expert < 3 for expert in range(EXPERTS)], [expert >= 3 for expert in range(EXPERTS)]])
    fleet = Fleet(workers=2, group_size=2, owners_LWE=(everything, halves))
    devices = (NEAR, FAR)
    return Dispatcher(
        SIZES, OWNERS, local={}, remote=remote, timeout_s=1.0, bounded=bounded, fleet=fleet, devices=devices
    )


def test_of_a_fleet_it_is_known_who_holds_what() -> None:
    remote = Remote(tells={FAR: {"loaded": (expert_id(0, 1),), "load_s": 0.004}})
    made = of_fleet(remote, bounded={FAR})
    assert not made.holding(0)[1].any() and made.holding(0)[0].all()
    assert made.holding(1).tolist() == [[True] * 3 + [False] * 3, [False] * EXPERTS]
    assert made.loads_s() == [None, None]
    ask(made, 0, 0, 1)
    assert np.flatnonzero(made.holding(0)[1]).tolist() == [1]
    assert made.loads_s() == [None, 0.004]


def test_what_is_told_of_holdings_may_be_changed() -> None:
    made = of_fleet(Remote(), bounded={NEAR, FAR})
    made.holding(0)[:] = True
    assert not made.holding(0).any()


def test_remote_workers_are_told_what_to_do_while_they_are_waited_for() -> None:
    made, done = of_fleet(Remote(), ()), list[int]()
    made.listen(lambda: done.append(1))
    ask(made, 0, 0, 1)
    assert done
