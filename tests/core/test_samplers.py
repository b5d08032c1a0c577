"""How many rows make a step: so many, or as many as fill so many rows of tokens."""

from __future__ import annotations

import random
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loomtune import samplers
from loomtune.errors import UserError
from loomtune.order import Order, Share
from loomtune.plan import findings
from loomtune.samplers import Counted, Packed, Sampler, sampler, steps, suits
from loomtune.settings import BatchSettings, Settings
from toys import Online, Plain, whole

WIDTH = 64


def lengths(count: int) -> Any:
    draw = random.Random(count)
    return np.array([draw.randint(1, 40) for _ in range(count)])


def packed(count: int = 300, epochs: int = 2, size: int = 4) -> Packed:
    return Packed(whole(0, count), size, count * epochs, lengths(count), WIDTH)


def drawn(one: Sampler, until: int) -> list[list[int]]:
    found: list[list[int]] = []
    while (begin := sum(map(len, found))) < until:
        found.append(one.step(begin))
    return found


@pytest.fixture(params=[8192, 100])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(samplers, "WINDOW", request.param)
    return int(request.param)


def fewest(rows: list[int], of: Any) -> int:
    """Rows that so many tokens need at least."""
    return -(-int(of[rows].sum()) // WIDTH)


def test_packed_steps_see_every_row_once_an_epoch_and_fill_what_they_have(window: int) -> None:
    one, of = packed(), lengths(300)
    made = drawn(one, 600)
    rows = [row for step in made for row in step]
    assert sorted(rows) == sorted([*range(300)] * 2)
    assert all(fewest(step, of) <= 4 for step in made)
    assert len(made) == one.steps(), "the steps that were counted before"
    filled = of[rows].sum() / (len(made) * 4 * WIDTH)
    assert filled > 0.96, "short samples fill the rows"


def test_an_epoch_of_packed_steps_ends_before_the_next_begins() -> None:
    rows = [row for step in drawn(packed(), 600) for row in step]
    assert sorted(rows[:300]) == sorted(rows[300:]) == list(range(300))
    assert rows[:300] != rows[300:]


def test_packed_steps_go_on_from_any_of_them_and_do_not_come_longest_first(window: int) -> None:
    made, of = drawn(packed(), 600), lengths(300)
    begins = np.cumsum([0, *map(len, made)])
    for number in (7, 3, len(made) - 1, 0):
        assert packed().step(int(begins[number])) == made[number]
    means = [of[step].mean() for step in made[:-1]]
    assert means != sorted(means, reverse=True)


def test_after_the_last_visit_that_was_planned_packed_steps_go_on() -> None:
    one = packed(epochs=1)
    made = drawn(one, 300)
    assert len(made) == one.steps() and sum(map(len, made)) == 300
    more = drawn(one, 500)
    assert more[: len(made)] == made and all(more)


def test_packed_steps_keep_the_shares_of_sources() -> None:
    shares = Share("a", 100, Fraction(70)), Share("b", 200, Fraction(30))
    one = Packed(Order(0, shares), 4, 200, lengths(300), WIDTH)
    rows = [row for step in drawn(one, 200) for row in step]
    assert [sum(row < 100 for row in rows[part]) for part in (slice(100), slice(100, 200))] == [70, 70]


def of(settings: Settings, lengths: Any) -> Sampler:
    train = SimpleNamespace(sources={"": len(lengths)}, lengths=lengths, origin=lambda row: f"rows.jsonl:{row + 1}")
    data = SimpleNamespace(visits=lambda rows: {name: Fraction(count) for name, count in rows.items()})
    return sampler(settings, train, data, WIDTH)  # type: ignore[arg-type]


def settings(name: str = "packed", **others: Any) -> Settings:
    return Settings(batch=BatchSettings(size=4, sampler=name), packing=True, **others)


def test_what_does_not_fit_into_a_row_is_refused_by_its_place() -> None:
    with pytest.raises(
        UserError, match=r"rows.jsonl:2 has 65 tokens in all its parts, and a row has 64\n    cure: raise"
    ):
        of(settings(), np.array([3, 65, 64]))
    assert of(settings(), np.array([3, 64])).step(0)
    assert of(settings("shuffled"), np.array([3, 65, 64])).step(0)


def test_an_objective_that_makes_its_samples_while_it_trains_is_not_packed_beforehand() -> None:
    with pytest.raises(UserError, match=r"makes its samples while it trains\n    cure: set batch.sampler=shuffled"):
        suits(settings(), Online())
    suits(settings(), Plain())
    suits(settings("shuffled"), Online())
    assert steps(settings(), of(settings(), np.array([3, 4])), Plain()) == 1
    assert steps(settings("shuffled"), of(settings("shuffled"), np.array([3, 4])), Online()) == Online.STEPS


@pytest.mark.parametrize("name", ["shuffled", "sequential", "packed"])
def test_a_run_that_would_visit_nothing_is_refused(name: str) -> None:
    none, some = settings(name, epochs=0.1), settings(name, epochs=0.5)
    with pytest.raises(UserError, match=r"epochs=0.1 visits none of 3 rows: nothing would be trained\n    cure: raise"):
        steps(none, of(none, np.array([3, 4, 5])), Plain())
    assert steps(some, of(some, np.array([3, 4, 5])), Plain()) == 1


def test_sources_that_an_epoch_does_not_reach_are_refused_alike() -> None:
    order = Order(0, (Share("a", 5, Fraction(3, 5)), Share("b", 5, Fraction(3, 5))))
    with pytest.raises(UserError, match=r"visits none of 10 rows.*\n    cure: raise epochs, or the shares"):
        steps(Settings(), Counted(order, 4, order.length(1.0)), Plain())


def test_where_steps_are_set_packing_has_no_end() -> None:
    one = of(settings(steps=9), np.array([3, 4, 5]))
    assert one.end == 0 and steps(settings(steps=9), one, Plain()) == 9
    assert sorted(one.step(0)) == sorted([*range(3)] * 4), "a row an epoch, none of which reaches into the next"


def test_rows_as_they_lie() -> None:
    one = of(settings("sequential", epochs=2.0), np.array([3, 4, 5]))
    assert isinstance(one, Counted)
    assert [one.step(0), one.step(4)] == [[0, 1, 2, 0], [1, 2]]


def test_packed_steps_need_rows_that_are_packed(tiny_model: Any, mixed_data: Any) -> None:
    from loomtune import api
    from loomtune.catalogue import installed

    given = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "batch.sampler=packed"]
    told = [one.cure for one in findings(api.compose(given), installed()) if one.fatal]
    assert told == ["set packing=true, or batch.sampler=shuffled"]
    assert not [one for one in findings(api.compose([*given, "packing=true"]), installed()) if one.fatal]
