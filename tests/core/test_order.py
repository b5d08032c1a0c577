"""Which rows a run visits: each source as often as its share says, in an order that its number alone decides."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from loomtune.order import TOGETHER, Order, Share, _visited
from toys import whole

SHARES = (Share("a", 7, Fraction(11, 2)), Share("b", 3, Fraction(10, 3)), Share("c", 40, Fraction(1, 4)))


def mixed(seed: int = 0, *, shuffled: bool = True) -> Order:
    return Order(seed, SHARES, shuffled)


def source(row: int) -> str:
    return "a" if row < 7 else "b" if row < 10 else "c"


def test_an_epoch_visits_each_source_as_often_as_its_share_comes_to_by_then() -> None:
    order = mixed()
    for epoch in range(24):
        rows = order.rows(order.before(epoch), order.before(epoch + 1))
        found = Counter(map(source, rows.tolist()))
        for share in SHARES:
            due = (epoch + 1) * share.visits // 1 - epoch * share.visits // 1
            assert found[share.name] == due
    twelve = Counter(map(source, order.rows(0, order.before(12)).tolist()))
    assert twelve == {"a": 66, "b": 40, "c": 3}, "twelve epochs are whole numbers of visits"


def test_visits_of_a_source_go_through_all_its_rows_before_any_comes_again() -> None:
    order = mixed()
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for epoch in range(60):
        for share in SHARES:
            rows = order.rows(order.before(epoch), order.before(epoch + 1)).tolist()
            seen[share.name] += [row for row in rows if source(row) == share.name]
    for share in SHARES:
        counts = Counter(seen[share.name]).values()
        assert max(counts) - min(counts, default=0) <= 1 or len(counts) < share.rows
        assert len(set(seen[share.name])) == min(share.rows, len(seen[share.name]))


def test_sources_are_mixed_within_an_epoch() -> None:
    order = Order(0, (Share("a", 50, Fraction(50)), Share("b", 50, Fraction(50))))
    first = [row < 50 for row in order.rows(0, 50).tolist()]
    assert 10 < sum(first) < 40


@pytest.mark.parametrize("order", [mixed(), mixed(shuffled=False), whole(3, 17)])
def test_a_visit_is_a_function_of_its_number_wherever_one_begins(order: Order) -> None:
    rows = order.rows(0, 100).tolist()
    _visited.cache_clear()
    for number in (99, 0, 57, 12):
        assert order.rows(number, number + 1).tolist() == rows[number : number + 1]
    assert order.rows(31, 77).tolist() == rows[31:77]


def test_rows_as_they_lie_come_source_after_source_and_go_on_in_the_next_epoch() -> None:
    order = mixed(shuffled=False)
    assert order.rows(0, order.before(2)).tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 5, 6, 0, 1, 2, 3, 7, 8, 9]
    plain = Order(0, (Share("", 4, Fraction(4)),), shuffled=False)
    assert plain.rows(0, 8).tolist() == [0, 1, 2, 3] * 2


def test_a_source_by_itself_has_the_order_of_data_that_mix_nothing_but_of_its_name() -> None:
    named = Order(0, (Share("a", 8, Fraction(8)),))
    assert whole(0, 8).rows(0, 8).tolist() == [3, 4, 2, 7, 0, 5, 1, 6]
    assert sorted(named.rows(0, 8).tolist()) == list(range(8))


def test_how_many_visits_epochs_are() -> None:
    assert [whole(0, 61).length(epochs) for epochs in (1, 2, 0.5)] == [61, 122, 30]
    assert [mixed().length(epochs) for epochs in (1, 2, 12)] == [8, 17, 109]


def test_an_epoch_without_visits_is_passed_over() -> None:
    order = Order(0, (Share("a", 3, Fraction(1, 4)),))
    assert order.before(8) == 2 and sorted(order.rows(0, 3).tolist()) == [0, 1, 2]


def test_a_visit_among_a_million_epochs_without_any_is_found_at_once() -> None:
    rare = Fraction(1, 10**6)
    order = Order(0, (Share("a", 3, rare), Share("b", 9, rare)))
    began = time.perf_counter()
    assert [order.epoch(number) for number in range(4)] == [999_999, 999_999, 1_999_999, 1_999_999]
    assert {source_of(order, row) for row in order.rows(0, 2).tolist()} == {"a", "b"}
    assert time.perf_counter() - began < 1


def source_of(order: Order, row: int) -> str:
    return order.shares[0].name if row < order.shares[0].rows else order.shares[1].name


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_tiny_source_is_gone_through_pass_after_pass_quickly(rows: int) -> None:
    order = Order(0, (Share("few", rows, Fraction(500_000)), Share("more", 9, Fraction(9))))
    began = time.perf_counter()
    seen = order.rows(0, order.before(2))
    assert time.perf_counter() - began < 2
    counts = np.bincount(seen[seen < rows], minlength=rows)
    assert counts.sum() == 1_000_000 and counts.max() - counts.min() <= 1


def test_passes_that_are_drawn_together_begin_where_the_epoch_before_ended() -> None:
    share = Share("few", 2, Fraction(4 * TOGETHER + 1))
    order = Order(0, (share,))
    seen = order.rows(0, order.before(6)).reshape(-1, 2)
    assert np.sort(seen, axis=1).tolist() == [[0, 1]] * len(seen)
    assert 0.3 < seen[:, 0].mean() < 0.7, "each pass has an order of its own"
    _visited.cache_clear()
    assert order.rows(700, 900).tolist() == seen.reshape(-1)[700:900].tolist()
