"""Bytes on links: by hand for small groups, and by what must hold for any."""

import math

import pytest

from loomtune.settings import Hardware, Link
from loomtune_plugins.planner import gloo, nccl
from loomtune_plugins.planner.trace import Collective, Trace
from loomtune_plugins.planner.wire import Flow, backend_of, groups, seconds, traffic

MIB = 1 << 20
OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "reduce", "gather", "scatter")
HOPPER = Hardware(kind="cuda", per_node=8, inside=Link(450), between=Link(50))


def collective(operation, size, ranks, *, count=1, dtype="torch.float32", phase="forward"):
    return Collective(operation, size, tuple(ranks), phase, dtype, count)


def trace(*collectives, processes, rank=0):
    return Trace(rank, processes, 1, {}, {}, {}, collectives, (), 0, 0, 1, (0, 0, 0))


def planned(*collectives, processes, per_node, backend="nccl"):
    return traffic(trace(*collectives, processes=processes), per_node, backend)


def test_a_ring_hands_on_all_but_a_rank_s_own_part():
    gathered = planned(collective("all_gather", 800, range(8)), processes=8, per_node=8)
    reduced = planned(collective("all_reduce", 800, range(8)), processes=8, per_node=8)

    assert gathered.rank == Flow(inside=700, between=0)
    assert reduced.rank == Flow(inside=1400, between=0)
    assert gathered.total.total == 8 * 700 and reduced.messages == 2 * gathered.messages == 14


def test_rings_over_nodes_send_every_node_s_bytes_once_spread_over_its_network_cards():
    """16 ranks on 2 nodes: of what a rank hands on, an eighth leaves its node, as each ring does it elsewhere."""
    both = planned(collective("reduce_scatter", 1600, range(16)), processes=16, per_node=8)

    assert both.nodes[0].between == both.nodes[1].between == pytest.approx(1500)
    assert both.rank == Flow(inside=pytest.approx(1500 * 7 / 8), between=pytest.approx(1500 / 8))


def test_hsdp_gathers_inside_a_node_and_reduces_between_those_of_the_same_place():
    shard, replicate = range(4), (0, 4)  # of 8 ranks on 2 nodes

    step = planned(
        collective("all_gather", 4000, shard), collective("all_reduce", 1000, replicate), processes=8, per_node=4
    )

    assert step.rank == Flow(inside=3000, between=1000)  # 3/4 of 4000; 2 x 1/2 of its quarter
    assert step.nodes == (Flow(inside=4 * 3000, between=4 * 1000),) * 2
    assert step.by["all_gather", "forward"].flow == Flow(inside=3000)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_groups_within_a_node_send_nothing_between_nodes(operation, backend):
    one = planned(collective(operation, 64 * MIB, range(4)), processes=16, per_node=4, backend=backend)

    assert one.total.between == 0 < one.total.inside
    assert len(set(one.nodes)) == 1 and len(one.nodes) == 4, "each node's group does the same"


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("group", [2, 3, 4, 6])
def test_whoever_sends_is_received_and_each_rank_is_handed_what_it_lacks(operation, backend, group):
    size = 12 * 1000  # of 3000 numbers, which every group divides
    nodes = [0] * (group // 2) + [1] * (group - group // 2)
    edges = list(gloo.edges(operation, size, 4, group) if backend == "gloo" else nccl.edges(operation, size, nodes))
    into = [sum(edge[2] for edge in edges if edge[1] == rank) for rank in range(group)]

    assert all(a != b and 0 <= a < group and 0 <= b < group for a, b, *_ in edges)
    if operation in {"all_gather", "all_to_all"}:
        assert into == pytest.approx([size * (group - 1) / group] * group)
    if operation == "all_reduce":
        assert sum(into) == pytest.approx(2 * size * (group - 1))
    if operation == "broadcast":
        assert into == pytest.approx([0, *[size] * (group - 1)])


def test_gloo_reduces_and_scatters_by_reducing_all_for_all():
    scattered = planned(collective("reduce_scatter", 4 * MIB, (0, 1)), processes=2, per_node=1, backend="gloo")
    reduced = planned(collective("all_reduce", 4 * MIB, (0, 1)), processes=2, per_node=1, backend="gloo")

    assert scattered.rank == reduced.rank == Flow(between=4 * MIB)


def test_gloo_s_ring_sends_whole_segments_so_the_last_ranks_may_have_nothing():
    """12 bytes for 4 ranks: segments of 4 bytes, two a rank, so the third and fourth have none of their own."""
    sent = {a: size for a, b, size, _ in gloo.edges("all_reduce", 12, 4, 4)}

    assert sent == {0: 24 - 8 - 0, 1: 24 - 4 - 8, 2: 24 - 0 - 4, 3: 24}


def test_gloo_frames_every_message_by_two_announcements_and_a_preamble():
    one = planned(collective("all_gather", 4000, (0, 1)), processes=2, per_node=1, backend="gloo")

    assert one.messages == 2  # both halves of its part
    assert one.framing[0] == Flow(between=2 * 48 * 2 + 48 * 2)
    assert planned(collective("all_gather", 4000, (0, 1)), processes=2, per_node=1).framing[0] == Flow()


@pytest.mark.parametrize(("ranks", "processes", "expected"), [
    ((0, 1), 4, ((0, 1), (2, 3))),
    ((0, 2), 4, ((0, 2), (1, 3))),
    ((4, 6), 8, ((0, 2), (1, 3), (4, 6), (5, 7))),
    ((1, 0), 4, ((1, 0), (3, 2))),  # a root that is not the lowest stays first
    ((0, 1, 4, 5), 8, ((0, 1, 4, 5), (2, 3, 6, 7))),
    ((0, 1, 2), 4, ((0, 1, 2),)),  # no such groups fill four ranks
    ((0, 2, 3), 10, ((0, 2, 3),)),  # the next would share a rank
])  # fmt: skip
def test_the_other_ranks_groups_are_this_one_moved(ranks, processes, expected):
    assert groups(ranks, processes) == expected


def test_a_rank_alone_sends_nothing_and_takes_no_time():
    alone = collective("all_reduce", 1000, (0,))

    assert planned(alone, processes=1, per_node=1).collectives == 0
    assert seconds(alone, HOPPER) == (0.0, 0.0)


def test_counts_multiply():
    thrice = planned(collective("all_gather", 800, range(4), count=2.5), processes=4, per_node=2)
    once = planned(collective("all_gather", 800, range(4)), processes=4, per_node=2)

    assert thrice.rank == once.rank * 2.5 and thrice.total == once.total * 2.5 and thrice.collectives == 2.5


def test_an_operation_that_is_not_known_is_named():
    for backend in ("nccl", "gloo"):
        with pytest.raises(AssertionError, match="all_to_none"):
            planned(collective("all_to_none", 8, range(2)), processes=2, per_node=2, backend=backend)


MEASURED = {128: 311, 256: 331, 512: 341, 1024: 349, 2048: 355, 4096: 358, 8192: 362}
"""MiB to GB/s of a reduce_scatter's bus among 8 H100: NVIDIA/nccl, issue 1047 (ring)."""


@pytest.mark.parametrize("size", MEASURED)
def test_published_times_of_one_node_lie_within_the_bounds(size):
    low, high = seconds(collective("reduce_scatter", size * MIB, range(8)), HOPPER)

    assert low <= 7 / 8 * size * MIB / (MEASURED[size] * 1e9) <= high <= 1.25 * low


def test_more_nodes_take_longer_for_the_same_bytes():
    times = [seconds(collective("all_gather", 1 << 30, range(8 * nodes)), HOPPER) for nodes in (1, 2, 8, 64)]

    assert times == sorted(times) and all(low < high for low, high in times)


def test_small_messages_take_the_time_of_their_hops_by_nccl_s_own_constants():
    """64 ranks on 8 nodes: of 63 hops 7 between nodes, by LL; of a tree 14 inside and 6 between."""
    gathered, _ = seconds(collective("all_gather", 64, range(64)), HOPPER)
    reduced, _ = seconds(collective("all_reduce", 64, range(64)), HOPPER)

    assert gathered == pytest.approx((6.6 + 56 * 1.0 + 7 * 2.7) * 1e-6, rel=1e-3)
    assert reduced == pytest.approx((6.8 + 14 * 0.6 + 6 * 5.0) * 1e-6, rel=1e-3)


def test_the_switch_of_a_node_may_add_up():
    """480 GB/s of bus for all_reduce among 8 H100 (NVIDIA/nccl, issue 1455), and what rings have among four."""
    eight, four = (seconds(collective("all_reduce", 4 << 30, range(n)), HOPPER)[0] for n in (8, 4))

    assert 7 / 4 * (4 << 30) / eight == pytest.approx(480e9, rel=0.01)
    assert 3 / 2 * (4 << 30) / four == pytest.approx(370e9, rel=0.01)


def test_a_link_of_unknown_speed_takes_no_finite_time():
    unknown = Hardware(kind="cuda", per_node=1, inside=Link(450))

    assert seconds(collective("all_gather", 1024, (0, 1)), unknown) == (math.inf, math.inf)


def test_processors_meet_by_gloo_and_everything_else_by_nccl():
    host = Hardware(kind="cpu", per_node=2, inside=Link(10, 5), between=Link(1, 50))
    inside, between = (seconds(collective("all_reduce", MIB, ranks), host) for ranks in ((0, 1), (0, 2)))
    told = seconds(collective("broadcast", MIB, range(0, 16, 2)), host)

    assert [backend_of(Hardware(kind=kind)) for kind in ("cpu", "cuda", "rocm")] == ["gloo", "nccl", "nccl"]
    assert inside[0] == pytest.approx(MIB / 10e9 + 4 * 5e-6)  # two segments, twice, one after the other
    assert between[0] == pytest.approx(MIB / 1e9 + 4 * 50e-6) and between[1] > between[0]
    assert told[0] == pytest.approx(3 * MIB / 1e9 + 3 * 50e-6)  # the first sends thrice
