"""Ownership by groups: everything covered, within memory, the group's own layers first, little read again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import CapacityError
from raymoe.placement.grouping import group_count, grouped_ownership, worker_groups
from raymoe.placement.ownership import Capacity, Ownership, owners_of
from raymoe.types import DeviceName, ExpertKey, LayerSize

SIZE = 10  # bytes of an expert in these tests


def layers(count: int, experts: int = 8, expert_bytes: int = SIZE) -> tuple[LayerSize, ...]:
    return (LayerSize(experts=experts, expert_bytes=expert_bytes, top_k=2),) * count


def workers(*experts: int, names: str = "abcdefgh") -> list[Capacity]:
    """Workers with room for so many experts of 10 bytes."""
    return [Capacity(device=DeviceName(name), host_bytes=n * SIZE) for name, n in zip(names, experts, strict=False)]


def counts(ownership: Ownership, layer: int) -> list[int]:
    """How many experts of a layer each worker owns."""
    return [sum(key.layer == layer for key in keys) for keys in ownership.values()]


def check(ownership: Ownership, sizes: tuple[LayerSize, ...], capacities: list[Capacity]) -> None:
    """Every expert has an owner, and nobody holds more than fits, or anything twice."""
    assert list(ownership) == [capacity.device for capacity in capacities]
    assert set(owners_of(ownership)) == {
        ExpertKey(layer=n, expert=e) for n, size in enumerate(sizes) for e in range(size.experts)
    }
    for capacity in capacities:
        held = ownership[capacity.device]
        assert list(held) == sorted(set(held))
        assert sum(sizes[key.layer].expert_bytes for key in held) <= capacity.host_bytes


@pytest.mark.parametrize(
    ("count", "size", "groups"),
    [
        (8, 4, ((0, 2, 4, 6), (1, 3, 5, 7))),
        (5, 2, ((0, 2, 4), (1, 3))),
        (3, 4, ((0, 1, 2),)),
        (2, 1, ((0,), (1,))),
    ],
)
def test_workers_are_dealt_out_to_groups(count: int, size: int, groups: tuple[tuple[int, ...], ...]) -> None:
    assert worker_groups(count, size) == groups
    assert group_count(count, size) == len(groups)


# --- what memory allows ---------------------------------------------------------------------------------


def test_with_room_for_all_everybody_owns_everything() -> None:
    ownership = grouped_ownership(layers(4), workers(32, 32, 32, 32), 2)
    assert [counts(ownership, layer) for layer in range(4)] == [[8, 8, 8, 8]] * 4


def test_without_spare_copies_only_the_own_group_owns_a_layer() -> None:
    ownership = grouped_ownership(layers(4), workers(32, 32, 32, 32), 2, spare=False)
    assert [counts(ownership, layer) for layer in range(4)] == [[8, 0, 8, 0], [0, 8, 0, 8]] * 2


def test_spare_copies_come_after_the_groups_own() -> None:
    ownership = grouped_ownership(layers(4), workers(20, 16, 16, 18), 2)
    assert [counts(ownership, layer) for layer in range(4)] == [[8, 0, 8, 1], [2, 8, 0, 8]] * 2


def test_with_room_for_one_copy_a_layer_is_spread_evenly_over_its_group() -> None:
    ownership = grouped_ownership(layers(4), workers(8, 8, 8, 8), 2)
    assert [counts(ownership, layer) for layer in range(4)] == [[4, 0, 4, 0], [0, 4, 0, 4]] * 2


def test_with_room_for_one_and_a_half_copies_each_layer_gets_its_half() -> None:
    ownership = grouped_ownership(layers(4), workers(12, 12, 12, 12), 2)
    assert [counts(ownership, layer) for layer in range(4)] == [[6, 0, 6, 0], [0, 6, 0, 6]] * 2
    assert all(len(owners) in (1, 2) for owners in owners_of(ownership).values())


def test_uneven_memory_is_used_in_proportion_within_each_layer() -> None:
    ownership = grouped_ownership(layers(2), workers(12, 4), 2)
    assert [counts(ownership, layer) for layer in range(2)] == [[6, 2], [6, 2]]


def test_a_group_without_room_leaves_experts_to_the_others() -> None:
    sizes, capacities = layers(2), workers(3, 13)
    ownership = grouped_ownership(sizes, capacities, 1)
    check(ownership, sizes, capacities)
    assert [counts(ownership, layer) for layer in range(2)] == [[3, 5], [0, 8]]


def test_pieces_that_fit_only_across_groups_are_found() -> None:
    """Two small experts would leave the first worker no room for the large one of the second's layer."""
    sizes = (*layers(1, experts=2), *layers(1, experts=1, expert_bytes=30))
    capacities = workers(3, 2)
    ownership = grouped_ownership(sizes, capacities, 1)
    check(ownership, sizes, capacities)
    assert [counts(ownership, layer) for layer in range(2)] == [[0, 2], [1, 0]]


def test_too_little_memory_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(CapacityError, match=r"16 experts x 1 owners take 160 bytes.* is 150 bytes \(a: 70, b: 80\)"):
        grouped_ownership(layers(2), workers(7, 8), 1)


def test_pieces_that_fit_nowhere_are_refused() -> None:
    capacities = [Capacity(device=DeviceName("a"), host_bytes=35), Capacity(device=DeviceName("b"), host_bytes=35)]
    with pytest.raises(CapacityError, match="not in pieces of whole experts"):
        grouped_ownership(layers(1, experts=7), capacities, 1)


# --- what was there before ------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [8, 11, 16, 25, 32])
def test_the_same_workers_keep_everything(room: int) -> None:
    sizes, capacities = layers(4), workers(room, room, room, room)
    old = grouped_ownership(sizes, capacities, 2)
    assert grouped_ownership(sizes, capacities, 2, old) == old


def test_more_memory_only_adds() -> None:
    old = grouped_ownership(layers(4), workers(8, 8, 8, 8), 2)
    new = grouped_ownership(layers(4), workers(12, 12, 12, 12), 2, old)
    assert all(set(old[device]) <= set(new[device]) for device in old)


def test_an_owner_outside_of_the_group_keeps_nothing_at_the_groups_cost() -> None:
    keys = [tuple(ExpertKey(layer=layer, expert=expert) for expert in range(8)) for layer in range(2)]
    wrong = {DeviceName("a"): keys[1], DeviceName("b"): keys[0]}
    assert list(grouped_ownership(layers(2), workers(8, 8), 1, wrong).values()) == keys


def test_what_another_model_or_worker_had_is_ignored() -> None:
    foreign: Ownership = {
        DeviceName("gone"): (ExpertKey(layer=0, expert=0),),
        DeviceName("a"): (ExpertKey(layer=9, expert=0),),
    }
    assert grouped_ownership(layers(2), workers(8, 8), 1, foreign) == grouped_ownership(layers(2), workers(8, 8), 1)


# --- properties -----------------------------------------------------------------------------------------

Cluster = tuple[tuple[LayerSize, ...], list[Capacity], int]


@st.composite
def clusters(draw: st.DrawFn, sizes_: tuple[int, ...] = (5, 10, 30)) -> Cluster:
    sizes = tuple(
        LayerSize(experts=draw(st.integers(1, 8)), expert_bytes=draw(st.sampled_from(sizes_)), top_k=2)
        for _ in range(draw(st.integers(1, 5)))
    )
    return sizes, workers(*draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))), draw(st.integers(1, 4))


def layers_and_workers(
    sizes: tuple[LayerSize, ...], capacities: list[Capacity], group_size: int
) -> list[tuple[list[int], tuple[int, ...]]]:
    """For each group its layers and its workers."""
    groups = worker_groups(len(capacities), group_size)
    return [([n for n in range(len(sizes)) if n % len(groups) == number], group) for number, group in enumerate(groups)]


@given(clusters(), st.booleans())
def test_ownership_is_whole_or_refused(cluster: Cluster, spare: bool) -> None:
    sizes, capacities, group_size = cluster
    try:
        ownership = grouped_ownership(sizes, capacities, group_size, spare=spare)
    except CapacityError:
        return
    check(ownership, sizes, capacities)


@given(clusters(sizes_=(SIZE,)))
def test_experts_of_one_size_are_never_refused_and_stay_in_a_group_that_has_room(cluster: Cluster) -> None:
    sizes, capacities, group_size = cluster
    room = [capacity.host_bytes // SIZE for capacity in capacities]
    if sum(room) < sum(size.experts for size in sizes):
        return
    ownership = grouped_ownership(sizes, capacities, group_size)
    check(ownership, sizes, capacities)
    for own, group in layers_and_workers(sizes, capacities, group_size):
        needed = sum(sizes[n].experts for n in own)
        held = {key for worker in group for key in ownership[capacities[worker].device] if key.layer in own}
        assert len(held) >= min(needed, sum(room[worker] for worker in group))


@given(clusters(sizes_=(SIZE,)))
def test_memory_is_first_of_all_for_the_groups_own_layers(cluster: Cluster) -> None:
    sizes, capacities, group_size = cluster
    room = [capacity.host_bytes // SIZE for capacity in capacities]
    parts = layers_and_workers(sizes, capacities, group_size)
    if any(sum(sizes[n].experts for n in own) > sum(room[worker] for worker in group) for own, group in parts):
        return  # experts of one group have to go to another
    ownership = grouped_ownership(sizes, capacities, group_size)
    for own, group in parts:
        for worker in group:
            held = [key for key in ownership[capacities[worker].device] if key.layer in own]
            assert len(held) == min(sum(sizes[n].experts for n in own), room[worker])


@given(clusters(), st.data())
def test_a_changed_cluster_is_whole_or_refused(cluster: Cluster, data: st.DataObject) -> None:
    sizes, capacities, group_size = cluster
    try:
        old = grouped_ownership(sizes, capacities, group_size)
    except CapacityError:
        return
    assert grouped_ownership(sizes, capacities, group_size, old) == old
    changed = workers(*data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=6)), names="gfedcba")
    try:
        new = grouped_ownership(sizes, changed, data.draw(st.integers(1, 4)), old)
    except CapacityError:
        return
    check(new, sizes, changed)
