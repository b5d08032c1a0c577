"""Which rows go and which stay, against the plainest way of saying it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from loomtune.errors import UserError
from loomtune_plugins.commands.prepare import meeting

REACH = 3


def compared(one: int, other: int) -> bool:
    """Whether two points share one of the toy's keys."""
    return one // 4 == other // 4 or (one + 2) // 4 == (other + 2) // 4


def greedy(points: Sequence[int], *, each: bool = False, lonely: bool = False) -> list[int]:
    """Keeps each point that is near to none that is kept."""
    kept: list[int] = []
    for point in points:
        near = (one for one in kept if abs(one - point) <= REACH and (each or compared(one, point)))
        if not any(not lonely or (one % 7 and point % 7) for one in near):
            kept.append(point)
    return kept


def drawn(seed: int, count: int = 150, most: int = 300) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(most) for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_of_rows_that_are_alike_the_first_stays(prepared: Callable[..., Any], seed: int) -> None:
    points = drawn(seed, most=[20, 60, 150, 300, 1000, 5][seed])
    assert prepared(points, "apart").points() == greedy(points)


@pytest.mark.parametrize("seed", range(3))
def test_where_there_are_no_keys_each_is_compared_with_each(prepared: Callable[..., Any], seed: int) -> None:
    points = drawn(seed, most=[10, 100, 1000][seed])
    assert prepared(points, ("apart", {"each": True})).points() == greedy(points, each=True)


def test_more_rows_than_a_stage_takes_are_refused(prepared: Callable[..., Any]) -> None:
    assert prepared(range(0, 40, 4), ("apart", {"each": True, "limit": 10})).points() == list(range(0, 40, 4))
    with pytest.raises(UserError, match="stage=apart takes no more than 9 rows, and there are 10") as refused:
        prepared(range(0, 40, 4), ("apart", {"each": True, "limit": 9}))
    assert "stage.apart.limit" in refused.value.faults[0].cure


@pytest.mark.parametrize("seed", range(3))
def test_equal_rows_that_are_alike_to_nothing_all_stay(prepared: Callable[..., Any], seed: int) -> None:
    points = drawn(seed, most=[14, 40, 200][seed])
    assert prepared(points, "lonely").points() == greedy(points, lonely=True)


def test_a_chain_does_not_eat_what_is_not_alike(prepared: Callable[..., Any]) -> None:
    assert prepared([4, 5, 6, 7, 8, 9, 10, 11], ("apart", {"each": True})).points() == [4, 8]


def test_every_dropped_row_names_one_that_stays(prepared: Callable[..., Any]) -> None:
    points = drawn(1, most=40)
    done = prepared(points, "apart", keep_dropped=True)
    staying = {row["origin"]: row["point"] for row in done.rows()}
    dropped = done.rows("dropped")
    assert len(dropped) == len(points) - len(staying)
    for row in dropped:
        origin, _, alike = row["detail"].partition(" ")
        far = abs(staying[origin] - row["row"]["point"])
        assert far <= REACH
        assert alike == f"({1 - far / 100:.4f})"


def test_rows_that_share_a_key_with_very_many_are_compared_with_the_first(
    prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "FIRST", 1)
    done = prepared([0, 3, 1, 2], "apart")
    (stage,) = done.manifest["stages"]
    assert done.points() == [0]
    assert stage["found"]["cut"] == {"keys": 1, "rows": 2}


def groups(points: Sequence[int]) -> list[set[int]]:
    """Numbers of rows that hang together."""
    left, found = set(range(len(points))), []
    while left:
        group = pending = {left.pop()}
        while pending:
            near = {
                other
                for one in pending
                for other in left
                if abs(points[one] - points[other]) <= REACH and compared(points[one], points[other])
            }
            left -= near
            group, pending = group | near, near
        found.append(group)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_hang_together_are_in_one_split(prepared: Callable[..., Any], seed: int) -> None:
    points = drawn(seed, count=200, most=[400, 700, 2000, 5000][seed])
    done = prepared(points, "grouped")
    where = {
        int(row["origin"].partition(":")[2]) - 1: split
        for split in ("train", "validation", "test")
        for row in done.rows(split)
    }
    assert sorted(where) == list(range(len(points)))
    expected = groups(points)
    assert all(len({where[one] for one in group}) == 1 for group in expected)
    assert done.manifest["stages"][0]["found"]["largest"] == max(map(len, expected))


def test_where_a_group_falls_is_drawn_by_what_its_rows_say_and_not_by_their_order(
    prepared: Callable[..., Any],
) -> None:
    points = drawn(5, most=3000)
    mixed = random.Random(1).sample(points, len(points))
    one, other, another = prepared(points, "grouped"), prepared(mixed, "grouped"), prepared(points, "grouped", seed=1)
    assert sorted(one.points("test")) == sorted(other.points("test"))
    assert sorted(one.points("test")) != sorted(another.points("test"))


def test_shares_are_about_what_was_asked(prepared: Callable[..., Any]) -> None:
    done = prepared(list(range(0, 8000, 8)), "grouped")
    for split, of in done.manifest["splits"].items():
        assert of["actual"] == pytest.approx(of["asked"], abs=0.04), split


def test_inputs_keep_splits_of_their_own_and_what_is_alike_to_them_goes(prepared: Callable[..., Any]) -> None:
    of = {"train": [100, 8, *range(1000, 3000, 8)], "test": [9, 40], "validation": [41, 200]}
    done = prepared(of, "grouped", keep_dropped=True)
    assert done.points("test") == [9, 40]
    assert done.points("validation") == [41, 200]
    assert 8 not in done.points()
    assert set(done.points()) == {100, *range(1000, 3000, 8)}
    told = [(row["origin"], row["reason"], row["detail"]) for row in done.rows("dropped")]
    assert told == [("train:2", "alike to a row of test", "test:1")]


def test_splits_that_inputs_lack_are_drawn_from_the_rest(prepared: Callable[..., Any]) -> None:
    done = prepared({"train": list(range(1000, 5000, 8)), "test": [9]}, "grouped")
    assert done.points("test") == [9]
    assert 0.15 < len(done.points("validation")) / 500 < 0.35
    assert done.manifest["splits"]["validation"]["asked"] == pytest.approx(0.25)


def test_of_duplicates_the_test_s_copy_stays(prepared: Callable[..., Any]) -> None:
    done = prepared({"train": [1, 50], "validation": [50, 90], "test": [1]}, "apart")
    assert {split: done.points(split) for split in ("test", "validation", "train")} == {
        "test": [1],
        "validation": [50, 90],
        "train": [],
    }


def test_rows_that_inputs_held_out_stay_however_alike_they_are(prepared: Callable[..., Any]) -> None:
    of = {"train": [1, 50, 60, 90], "validation": [50, 51, 2], "test": [1, 1, 2, 3]}
    for stages in (["apart"], ["apart", "grouped"], [("apart", {"each": True})], ["grouped"]):
        done = prepared(of, *stages)
        assert done.points("test") == [1, 1, 2, 3]
        assert done.points("validation") == [50, 51, 2]
        assert done.points() == [60, 90]


def test_the_row_that_swallowed_the_most_is_told(prepared: Callable[..., Any]) -> None:
    (stage,) = prepared([5, 100, 5, 101, 5, 6, *range(200, 300, 8)], "apart").manifest["stages"]
    assert stage["found"]["dropped"] == 4
    assert (stage["found"]["most"]["origin"], stage["found"]["most"]["rows"]) == ("train:1", 3)
    assert "point 5" in stage["found"]["most"]["excerpt"]
