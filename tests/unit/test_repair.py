"""Who should own what when devices come and go, and what engines are told of it."""

from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import CapacityError
from raymoe.placement.ownership import Capacity, Ownership, assign, every_expert
from raymoe.placement.repair import Moves, Target, find_target, moves_towards
from raymoe.placement.roster import Roster
from raymoe.types import DeviceName, ExpertKey, LayerSize

A, B, C = (DeviceName(name) for name in "abc")
SIZES = (LayerSize(experts=4, expert_bytes=10, top_k=2), LayerSize(experts=4, expert_bytes=10, top_k=2))
ALL = every_expert(SIZES)


def by_room(capacities: list[Capacity], owners: int, held: Ownership) -> Ownership:
    return assign(SIZES, capacities, owners, [1, 1], held)


def room(**bytes_: int) -> list[Capacity]:
    return [Capacity(device=DeviceName(name), host_bytes=size) for name, size in bytes_.items()]


def target(capacities: list[Capacity], held: Ownership, wanted: int = 1, pinned: frozenset = frozenset()) -> Target:
    return find_target(SIZES, capacities, held, wanted, by_room, pinned)


def test_what_a_dead_device_held_goes_to_the_living() -> None:
    found = target(room(a=80), {A: ALL[:4]})
    assert found == Target(ownership={A: ALL}, replication=1)


def test_fewer_copies_where_the_living_have_no_room_for_more() -> None:
    found = target(room(a=80, b=40), {A: ALL, B: ALL[:4]}, wanted=2)
    assert found.replication == 1 and not found.lost
    assert target(room(a=80), {A: ALL}, wanted=2).replication == 1


def test_what_does_not_fit_is_lost_and_what_is_held_stays() -> None:
    found = target(room(a=60), {A: ALL[2:5]})
    assert set(found.ownership[A]) >= set(ALL[2:5]) and len(found.ownership[A]) == 6
    assert found.replication == 0 and set(found.lost) == set(ALL) - set(found.ownership[A])


def test_second_copies_make_room_for_first_ones() -> None:
    found = target(room(a=40, b=30), {A: ALL[:4], B: ALL[1:4]})
    assert len({key for keys in found.ownership.values() for key in keys}) == 7 and len(found.lost) == 1


def test_nobody_there_loses_everything() -> None:
    assert target([], {}) == Target(ownership={}, replication=0, lost=ALL)


def test_a_device_of_the_engines_process_keeps_its_shard() -> None:
    found = target(room(a=40, b=80), {A: ALL[:4]}, pinned=frozenset({A}))
    assert found.ownership[A] == ALL[:4] and set(found.ownership[B]) >= set(ALL[4:])


def test_moves_read_first_what_nobody_holds_and_give_up_what_all_owners_have() -> None:
    held = {A: ALL[:6], B: ALL[6:7]}
    wanted = {A: ALL[:4], B: (ALL[4], ALL[5], ALL[6], ALL[7])}
    assert moves_towards(SIZES, room(a=80, b=20), held, wanted) == Moves(load={B: (ALL[7],)}, drop={})
    assert moves_towards(SIZES, room(a=80, b=80), held, wanted).load == {B: (ALL[7], ALL[4], ALL[5])}
    held[B] = (ALL[4], ALL[6])
    assert moves_towards(SIZES, room(a=80, b=80), held, wanted).drop == {A: (ALL[4],)}


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=3),
    st.lists(st.sets(st.integers(0, 7)), min_size=3, max_size=3),
    st.integers(1, 3),
)
def test_repeated_moves_reach_the_target_within_memory_and_lose_no_last_copy(
    rooms: list[int], parts: list[set[int]], wanted: int
) -> None:
    names = [A, B, C][: len(rooms)]
    capacities = [Capacity(device=n, host_bytes=size) for n, size in zip(names, rooms, strict=True)]
    held = {
        name: {ALL[n] for n in sorted(part)[: size // 10]}
        for name, part, size in zip(names, parts, rooms, strict=False)
    }
    goal = target(capacities, {name: tuple(sorted(keys)) for name, keys in held.items()}, wanted)
    there = {key for keys in held.values() for key in keys}
    for _ in range(50):
        moves = moves_towards(SIZES, capacities, {n: tuple(sorted(k)) for n, k in held.items()}, goal.ownership)
        if not moves:
            break
        for name, keys in moves.load.items():
            held[name] |= set(keys)
        for name, keys in moves.drop.items():
            held[name] -= set(keys)
        assert all(len(held[c.device]) * 10 <= c.host_bytes for c in capacities)
        now = {key for keys in held.values() for key in keys}
        assert there - set(goal.lost) <= now
        there = now
    assert set(goal.lost) | there == set(ALL)
    assert goal.replication == 0 or not goal.lost


def test_capacity_errors_of_the_policy_lower_the_copies() -> None:
    asked = []

    def strict(capacities: list[Capacity], owners: int, held: Ownership) -> Ownership:
        asked.append(owners)
        if owners > 1:
            raise CapacityError("no")
        return {A: ALL, B: ()}

    assert find_target(SIZES, room(a=80, b=80), {}, 2, strict).replication == 1 and asked == [2, 1]


# --- the roster -------------------------------------------------------------------------------------------


def roster(*serving: DeviceName) -> Roster:
    """A and B, of which these serve and hold everything."""
    found = Roster([A, B], 0.0)
    for device in serving:
        found.appeared(device, f"{device}1", ALL, 0.0)
        found.health[device].completed(f"{device}1")
        found.health[device].heard(f"{device}1", 0.1)
    found.publish()
    return found


def test_a_version_says_what_those_hold_that_serve() -> None:
    found = roster(A)
    assert (found.version, found.ownership) == (1, {A: ALL, B: ()})
    assert not found.publish() and found.version == 1
    found.died(A, "a1", "gone", 1.0)
    assert found.publish() and (found.version, found.ownership) == (2, {A: (), B: ()})
    assert found.missing(ALL) == ALL


def test_another_process_with_the_same_shard_is_another_version() -> None:
    found = roster(A)
    found.appeared(A, "a2", ALL, 1.0)
    found.health[A].completed("a2")
    found.health[A].heard("a2", 1.1)
    assert found.publish() and found.version == 2


def test_a_copy_goes_only_when_every_engine_works_without_it() -> None:
    found = roster(A, B)
    for engine in ("one", "two"):
        found.join(engine)
        found.tell(engine, 1)
    found.withdraw(B, ALL[:2])
    assert found.publish() and found.ownership[B] == ALL[2:]
    assert found.droppable() == {}
    found.tell("one", 2)
    assert found.droppable() == {}
    found.tell("two", 2)
    assert found.droppable() == {B: ALL[:2]}
    found.dropped(B, ALL[:2])
    assert found.droppable() == {} and found.held(B) == ALL[2:]


def test_an_engine_that_has_not_joined_this_life_or_is_gone() -> None:
    found = roster(A, B)
    found.tell("stranger", 99)  # what it works with was told by an earlier life of the actor
    found.withdraw(B, ALL[:1])
    found.publish()
    assert found.droppable() == {}
    found.forget_engines(set())
    assert found.droppable() == {B: ALL[:1]}


def test_a_withdrawn_copy_can_be_kept_after_all() -> None:
    found = roster(A, B)
    found.withdraw(B, ALL[:1])
    found.publish()
    found.keep(B, ALL)
    assert found.publish() and found.ownership[B] == ALL and found.droppable() == {}


def test_what_is_withdrawn_dies_with_its_process() -> None:
    found = roster(A, B)
    found.withdraw(B, [ExpertKey(layer=0, expert=0)])
    found.died(B, "b1", "gone", 1.0)
    found.publish()
    assert found.droppable() == {} and found.held(B) == ()


def test_what_has_not_changed_is_not_looked_through_again() -> None:
    found = roster(A)
    before = found.state
    assert not found.publish() and found.state == before
    found.gained(A, found.held(A))
    assert found.state != before and not found.publish(), "nothing is new, which takes a look to find out"
