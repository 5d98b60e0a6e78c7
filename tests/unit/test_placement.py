"""Placement: who owns what within which memory, what moves when workers come and go, whom to ask, whom to evict."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raymoe.errors import CapacityError
from raymoe.placement.eviction import least_recently_used, prefetch_is_welcome
from raymoe.placement.ownership import (
    Capacity,
    Ownership,
    assign,
    check_fits,
    layer_spread,
    owners_of,
    primary_owners,
    replication_factor,
)
from raymoe.placement.state import FIRST_HOLD_S, HOLD_S, ClusterState, Holders
from raymoe.types import DeviceName, ExpertKey, LayerSize

SIZE = 10  # bytes of an expert in these tests
ROOMY = 10**6


def layers(count: int, experts: int = 8, expert_bytes: int = SIZE, top_k: int = 2) -> tuple[LayerSize, ...]:
    return (LayerSize(experts=experts, expert_bytes=expert_bytes, top_k=top_k),) * count


def workers(*host_bytes: int, names: str = "abcdefgh") -> list[Capacity]:
    return [
        Capacity(device=DeviceName(name), host_bytes=bytes_) for name, bytes_ in zip(names, host_bytes, strict=False)
    ]


def counts(ownership: Ownership) -> list[int]:
    return [len(keys) for keys in ownership.values()]


def check(ownership: Ownership, sizes: tuple[LayerSize, ...], capacities: list[Capacity], replication: int) -> None:
    """Every expert has exactly so many distinct owners, and nobody holds more than fits."""
    owners = owners_of(ownership)
    assert set(owners) == {ExpertKey(layer=n, expert=e) for n, size in enumerate(sizes) for e in range(size.experts)}
    assert all(len(set(devices)) == len(devices) == replication for devices in owners.values())
    for capacity in capacities:
        held = ownership[capacity.device]
        assert len(set(held)) == len(held)
        assert sum(sizes[key.layer].expert_bytes for key in held) <= capacity.host_bytes


def moved(before: Ownership, after: Ownership) -> int:
    """Experts that a worker has to read because it did not hold them."""
    return sum(len(set(keys) - set(before.get(device, ()))) for device, keys in after.items())


# --- handing out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host_bytes", "replication", "expected"),
    [
        ([ROOMY], 1, [32]),
        ([ROOMY, ROOMY], 1, [16, 16]),
        ([ROOMY, ROOMY], 2, [32, 32]),
        ([ROOMY] * 4, 1, [8, 8, 8, 8]),
        ([ROOMY] * 4, 2, [16, 16, 16, 16]),
        ([ROOMY] * 4, 4, [32, 32, 32, 32]),
        ([160, 160], 1, [16, 16]),  # exactly full
        ([320], 1, [32]),
    ],
)
def test_equal_workers_get_equal_shares(host_bytes: list[int], replication: int, expected: list[int]) -> None:
    sizes, capacities = layers(4), workers(*host_bytes)
    ownership = assign(sizes, capacities, replication, [len(capacities)] * 4)
    check(ownership, sizes, capacities, replication)
    assert counts(ownership) == expected


@pytest.mark.parametrize("spread", [1, 2, 3])
@pytest.mark.parametrize("host_bytes", [[300, 100], [100, 300], [200, 100, 100], [1000, 20, 20], [90, 80, 150]])
def test_uneven_memories_are_all_respected(host_bytes: list[int], spread: int) -> None:
    sizes, capacities = layers(4), workers(*host_bytes)
    ownership = assign(sizes, capacities, 1, [spread] * 4)
    check(ownership, sizes, capacities, 1)


def test_larger_workers_get_larger_shares() -> None:
    ownership = assign(layers(12), workers(4000, 2000), 1, [1] * 12)
    assert counts(ownership) == [64, 32]


def test_layers_of_different_sizes_are_balanced_by_bytes() -> None:
    sizes = (*layers(2, expert_bytes=30), *layers(6, expert_bytes=10))
    capacities = workers(ROOMY, ROOMY)
    ownership = assign(sizes, capacities, 1, [2] * 8)
    held = [sum(sizes[key.layer].expert_bytes for key in keys) for keys in ownership.values()]
    assert held == [480, 480]


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_a_layer_is_spread_over_as_many_workers_as_asked(spread: int) -> None:
    ownership = assign(layers(8), workers(*[ROOMY] * 4), 1, [spread] * 8)
    for layer in range(8):
        involved = [device for device, keys in ownership.items() if any(key.layer == layer for key in keys)]
        assert len(involved) == spread


def test_ownership_does_not_depend_on_chance() -> None:
    arguments = (layers(5), workers(500, 300, 400), 2, [2] * 5)
    assert assign(*arguments) == assign(*arguments)


@pytest.mark.parametrize("replication", [1, 2])
def test_whatever_can_fit_does_fit(replication: int) -> None:
    """A tight squeeze: all memory is needed, and some workers hold a copy of nearly everything."""
    sizes = layers(4)
    for host_bytes in ([320, 160, 160], [320, 320, 0], [310, 170, 160], [250, 200, 190], [320, 100, 100, 120]):
        capacities = workers(*host_bytes)
        check(assign(sizes, capacities, replication, [2] * 4), sizes, capacities, replication)


# --- too little memory ----------------------------------------------------------------------------------


def test_too_little_memory_is_refused_with_the_arithmetic() -> None:
    message = (
        r"32 experts x 2 owners take 640 bytes.* the workers' host memory is 350 bytes \(a: 200, b: 150\); "
        r"add a device, raise host_memory, or lower replication"
    )
    with pytest.raises(CapacityError, match=message):
        check_fits(layers(4), workers(200, 150), 2)
    with pytest.raises(CapacityError, match=message):
        assign(layers(4), workers(200, 150), 2, [2] * 4)


def test_more_owners_than_workers_are_refused() -> None:
    with pytest.raises(CapacityError, match="3 owners per expert need as many workers, but there are 2"):
        assign(layers(1), workers(ROOMY, ROOMY), 3, [1])


def test_enough_memory_in_sum_but_not_for_distinct_owners_is_refused() -> None:
    with pytest.raises(CapacityError, match="too uneven"):
        assign(layers(4), workers(10_000, 50), 2, [1] * 4)


def test_leftovers_too_small_for_an_expert_are_refused_without_blaming_replication() -> None:
    """33 bytes twice are 66, but hold 3 + 3 experts of 10, not 6.6."""
    with pytest.raises(CapacityError) as caught:
        assign(layers(1, experts=7), workers(35, 35), 1, [1])
    assert "lower replication" not in str(caught.value)


# --- joining and leaving --------------------------------------------------------------------------------


def shares(count: int) -> list[int]:
    return [ROOMY] * count


@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("spread", [1, 2, 4])
@pytest.mark.parametrize("before", [2, 3, 4])
def test_a_worker_that_joins_takes_its_share_and_nothing_else_moves(before: int, spread: int, replication: int) -> None:
    sizes = layers(12)
    old = assign(sizes, workers(*shares(before)), replication, [spread] * 12)
    capacities = workers(*shares(before + 1))
    new = assign(sizes, capacities, replication, [spread] * 12, old)
    check(new, sizes, capacities, replication)
    fair = replication * 96 / (before + 1)
    assert moved(old, new) <= fair + before + 1, "the newcomer's share, give or take rounding per worker"
    assert max(counts(new)) - min(counts(new)) <= 8, "balanced to a layer"


@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("spread", [1, 2, 4])
@pytest.mark.parametrize("before", [3, 4])
def test_a_worker_that_leaves_moves_only_what_it_held(before: int, spread: int, replication: int) -> None:
    sizes = layers(12)
    old = assign(sizes, workers(*shares(before)), replication, [spread] * 12)
    capacities = workers(*shares(before - 1))
    new = assign(sizes, capacities, replication, [spread] * 12, old)
    check(new, sizes, capacities, replication)
    gone = old[DeviceName("abcdefgh"[before - 1])]
    assert moved(old, new) <= len(gone) + before, "give or take rounding per worker"
    assert min(counts(new)) >= 0.7 * replication * 96 / (before - 1), "copies on others limit who may take over"


def test_the_same_workers_keep_everything() -> None:
    sizes, capacities = layers(6), workers(*shares(3))
    old = assign(sizes, capacities, 2, [2] * 6)
    assert assign(sizes, capacities, 2, [2] * 6, old) == old


def test_a_worker_whose_memory_shrank_gives_up_what_does_not_fit() -> None:
    sizes = layers(1, experts=6)
    old = assign(sizes, workers(60, 60), 1, [1])
    assert counts(old) == [6, 0]
    capacities = workers(55, 60)
    check(assign(sizes, capacities, 1, [1], old), sizes, capacities, 1)
    tight = workers(25, 45)
    check(assign(sizes, tight, 1, [1], old), sizes, tight, 1)


def test_more_owners_are_added_beside_the_old_ones() -> None:
    sizes, capacities = layers(4), workers(*shares(2))
    old = assign(sizes, capacities, 1, [1] * 4)
    new = assign(sizes, capacities, 2, [1] * 4, old)
    check(new, sizes, capacities, 2)
    assert moved(old, new) == 32


# --- properties -----------------------------------------------------------------------------------------


@st.composite
def clusters(draw: st.DrawFn) -> tuple[tuple[LayerSize, ...], list[Capacity], int, list[int]]:
    sizes = tuple(
        LayerSize(experts=draw(st.integers(1, 12)), expert_bytes=draw(st.sampled_from([5, 10, 30])), top_k=2)
        for _ in range(draw(st.integers(1, 5)))
    )
    capacities = workers(*draw(st.lists(st.integers(0, 2000), min_size=1, max_size=6)))
    replication = draw(st.integers(1, min(3, len(capacities))))
    return sizes, capacities, replication, [draw(st.integers(1, 4)) for _ in sizes]


@given(clusters())
def test_ownership_is_whole_or_refused(cluster: tuple[tuple[LayerSize, ...], list[Capacity], int, list[int]]) -> None:
    sizes, capacities, replication, spreads = cluster
    try:
        ownership = assign(sizes, capacities, replication, spreads)
    except CapacityError:
        return
    check(ownership, sizes, capacities, replication)


def test_a_kept_owner_is_not_taken_for_the_missing_one() -> None:
    sizes = (LayerSize(experts=2, expert_bytes=30, top_k=2),)
    current = {DeviceName("b"): (ExpertKey(layer=0, expert=0), ExpertKey(layer=0, expert=1))}
    capacities = [Capacity(device=DeviceName("b"), host_bytes=30), Capacity(device=DeviceName("c"), host_bytes=90)]
    with pytest.raises(CapacityError, match="too uneven"):
        assign(sizes, capacities, 2, [1], current)


@given(clusters(), st.data())
def test_a_changed_cluster_is_whole_or_refused(
    cluster: tuple[tuple[LayerSize, ...], list[Capacity], int, list[int]], data: st.DataObject
) -> None:
    sizes, capacities, replication, spreads = cluster
    try:
        old = assign(sizes, capacities, replication, spreads)
        changed = [
            Capacity(device=capacity.device, host_bytes=data.draw(st.integers(0, 2000)))
            for capacity in workers(*[0] * 6)
            if data.draw(st.booleans())
        ]
        assume(changed)
        other = data.draw(st.integers(1, len(changed)))
        new = assign(sizes, changed, other, spreads, old)
    except CapacityError:
        return
    check(new, sizes, changed, other)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_experts_of_one_size_fit_wherever_that_is_possible(
    fitting: list[int], replication: int, spread: int, depth: int
) -> None:
    sizes = layers(depth)
    wanted = 8 * depth
    assume(sum(min(count, wanted) for count in fitting) >= replication * wanted)
    capacities = workers(*(count * SIZE for count in fitting))
    check(assign(sizes, capacities, replication, [spread] * depth), sizes, capacities, replication)


# --- whom to ask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("spread", [1, 2, 4])
def test_every_expert_is_asked_of_an_owner(spread: int, replication: int) -> None:
    sizes = layers(8)
    ownership = assign(sizes, workers(*shares(4)), replication, [spread] * 8)
    primary = primary_owners(sizes, ownership, [spread] * 8)
    owners = owners_of(ownership)
    assert set(primary) == set(owners)
    assert all(device in owners[key] for key, device in primary.items())


@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("spread", [1, 2, 4])
def test_a_layer_asks_as_few_workers_as_its_spread(spread: int, replication: int) -> None:
    sizes = layers(8)
    ownership = assign(sizes, workers(*shares(4)), replication, [spread] * 8)
    primary = primary_owners(sizes, ownership, [spread] * 8)
    for layer in range(8):
        assert len({device for key, device in primary.items() if key.layer == layer}) == spread


@pytest.mark.parametrize("replication", [1, 2])
@pytest.mark.parametrize("spread", [1, 2, 4])
def test_work_is_balanced_over_the_owners(spread: int, replication: int) -> None:
    sizes = layers(8)
    ownership = assign(sizes, workers(*shares(4)), replication, [spread] * 8)
    primary = primary_owners(sizes, ownership, [spread] * 8)
    asked = [sum(owner == device for owner in primary.values()) for device in ownership]
    assert asked == [16] * 4


def test_an_expert_without_owner_is_left_out() -> None:
    primary = primary_owners(layers(1), {DeviceName("a"): (ExpertKey(layer=0, expert=3),)}, [2])
    assert primary == {ExpertKey(layer=0, expert=3): "a"}


# --- spread and replication -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expert_bytes", "top_k", "count", "spread"),
    [
        (100_000, 4, 4, 1),  # the embedded model: 0.05 ms in all, a hop costs more
        (1_200_000, 4, 4, 2),  # 0.6 ms: two hops' worth
        (9_000_000, 8, 4, 4),  # 9 ms: every worker helps
        (9_000_000, 8, 1, 1),
        (9_000_000, 2, 4, 2),  # no more workers than experts per token
        (0, 4, 4, 1),
    ],
)
def test_a_layer_is_spread_where_that_saves_more_than_a_hop(
    expert_bytes: int, top_k: int, count: int, spread: int
) -> None:
    assert layer_spread(LayerSize(experts=64, expert_bytes=expert_bytes, top_k=top_k), count) == spread


def test_a_slow_link_widens_the_spread() -> None:
    size = LayerSize(experts=64, expert_bytes=100_000, top_k=4)
    assert layer_spread(size, 4, link_bytes_per_s=2e8) == 4


@pytest.mark.parametrize(
    ("wanted", "total", "host_bytes", "owners"),
    [
        ("auto", 100, [200, 200], 2),  # two copies are half of the memory
        ("auto", 101, [200, 200], 1),
        ("auto", 1, [10**9], 1),  # one worker can't hold two copies apart
        (1, 1, [10**9, 10**9], 1),
        (3, 10**9, [1, 1], 3),  # asked for: whether it fits is checked elsewhere
    ],
)
def test_two_owners_by_default_where_half_of_the_memory_holds_them(
    wanted: int, total: int, host_bytes: list[int], owners: int
) -> None:
    assert replication_factor(wanted, total, workers(*host_bytes)) == owners


# --- eviction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last_use", "evictable", "victim"),
    [
        ([5, 3, 9], [1, 1, 1], 1),
        ([5, 3, 9], [1, 0, 1], 0),
        ([5, 3, 9], [0, 0, 0], None),
        ([4, 4, 4], [0, 1, 1], 1),  # ties go to the lower slot
        ([], [], None),
    ],
)
def test_the_least_recently_used_slot_is_given_up(last_use: list[int], evictable: list[int], victim: int) -> None:
    assert least_recently_used(np.array(last_use, dtype=np.int64), np.array(evictable, dtype=bool)) == victim


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=20))
def test_the_victim_is_evictable_and_oldest(slots: list[tuple[int, bool]]) -> None:
    last_use = np.array([use for use, _ in slots], dtype=np.int64)
    evictable = np.array([can for _, can in slots], dtype=bool)
    victim = least_recently_used(last_use, evictable)
    if victim is None:
        assert not evictable.any()
    else:
        assert evictable[victim] and last_use[victim] == last_use[evictable].min()


@pytest.mark.parametrize(
    ("score", "victim_score", "welcome"),
    [(0.5, 0.4, True), (0.4, 0.4, False), (0.3, 0.4, False), (0.0, None, True), (float("nan"), 0.4, False)],
)
def test_a_prefetch_must_be_better_than_what_it_costs(score: float, victim_score: float | None, welcome: bool) -> None:
    assert prefetch_is_welcome(score, victim_score) is welcome


# --- the placement actor's state ------------------------------------------------------------------------


def test_residency_follows_what_workers_tell() -> None:
    state = ClusterState()
    state.apply_residency(DeviceName("a"), [1, 2, 3], [])
    state.apply_residency(DeviceName("a"), [4], [1, 9])
    state.apply_residency(DeviceName("b"), [1], [])
    assert state.resident == {"a": {2, 3, 4}, "b": {1}}


def test_a_cluster_lives_while_somebody_holds_it() -> None:
    holders = Holders(created_s=0.0)
    holders.renew("driver", 10.0)
    holders.renew("engine", 12.0)
    holders.release("driver")
    assert not holders.is_abandoned(12.0 + HOLD_S)
    assert holders.is_abandoned(12.0 + HOLD_S + 0.1)


def test_the_last_release_ends_it_at_once() -> None:
    holders = Holders(created_s=0.0)
    holders.renew("driver", 10.0)
    holders.release("driver")
    holders.release("never seen")
    assert holders.is_abandoned(10.0)


def test_a_start_that_nobody_took_hold_of_is_abandoned_later() -> None:
    holders = Holders(created_s=100.0)
    assert not holders.is_abandoned(100.0 + FIRST_HOLD_S)
    assert holders.is_abandoned(100.0 + FIRST_HOLD_S + 0.1)


def test_a_restarted_actor_whose_holder_leaves_before_it_renewed_waits_only_for_the_others() -> None:
    holders = Holders(created_s=0.0)
    holders.release("the engine that held its former life")
    assert not holders.is_abandoned(HOLD_S - 1)
    assert holders.is_abandoned(HOLD_S + 1)
