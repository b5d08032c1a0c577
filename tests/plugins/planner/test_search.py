"""The search finds the planted optimum, asks for less than everything, and keeps to its time."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from loomtune_plugins.planner.search import Candidate, Found, Move, Outcome, Search, Tried, fewest, remedies, score

CAPACITY = 100
AXES = ("replicate", "checkpointing", "offload", "micro")
SLOWER = (False, True, True, True)


def lattice(family: str = "fsdp", sizes: Sequence[int] = (4, 2, 2, 3), processes: int = 8) -> list[Candidate]:
    """Every combination of so many steps of thrift on each axis."""
    return [
        Candidate(family, tuple(map(float, steps)), tuple(zip(AXES, steps, strict=True)), processes, hosted=steps[2])
        for steps in itertools.product(*(range(size) for size in sizes))
    ]


def searched(
    candidates: Sequence[Candidate], evaluate: Callable[[Candidate], Outcome], **how: object
) -> tuple[Found, list[Candidate]]:
    asked: list[Candidate] = []

    def noted(candidate: Candidate) -> Outcome:
        asked.append(candidate)
        return evaluate(candidate)

    return Search(noted, SLOWER, **how).run(candidates), asked  # type: ignore[arg-type]


def planted(candidate: Candidate) -> Outcome:
    """120 bytes and 10 seconds, less and more by what each step of thrift saves and costs."""
    copies, again, offload, micro = candidate.thrift
    taken = 120 - 8 * copies - 12 * again - 30 * offload - 3 * micro
    seconds = 10 + 0.3 * copies + 3 * again + 40 * offload + 0.5 * micro
    return Outcome(int(taken), CAPACITY, seconds=(seconds, seconds), tokens_per_second=(1 / seconds, 1 / seconds))


def test_the_planted_optimum_is_found() -> None:
    found, asked = searched(lattice(), planted)
    assert found.best is not None
    # Three steps less of copies save 24 for 0.9 s; checkpointing 12 for 3 s; offload 30 for 40 s.
    assert dict(found.best.candidate.settings) == {"replicate": 3, "checkpointing": 0, "offload": 0, "micro": 0}
    assert (found.best.outcome.bytes, found.best.outcome.seconds) == (96, (10.9, 10.9))
    assert len(asked) == len(set(asked)) == found.tried < found.candidates == 48
    assert found.left_out == 0
    assert found.tried + found.cannot_fit + found.cannot_be_better == found.candidates


def monotone(seed: int, sizes: Sequence[int]) -> Callable[[Candidate], Outcome]:
    """Memory that falls along every axis and time that rises along the slow ones, otherwise at random."""
    draw = random.Random(seed)
    shape = [list(range(size)) for size in sizes]
    noise = {steps: draw.random() for steps in itertools.product(*shape)}
    speed = {steps: draw.random() for steps in itertools.product(*shape)}
    memory: dict[tuple[int, ...], float] = {}
    seconds: dict[tuple[int, ...], float] = {}
    for steps in itertools.product(*shape):
        before = [tuple(s - (i == axis) for i, s in enumerate(steps)) for axis in range(len(steps)) if steps[axis]]
        memory[steps] = min([memory[one] for one in before], default=150.0) - 12 * noise[steps]
        slow = [one for one in before if [a != b for a, b in zip(one, steps, strict=True)].index(True) > 0]
        seconds[steps] = max([seconds[one] for one in slow], default=5 * speed[steps]) + speed[steps]

    def evaluate(candidate: Candidate) -> Outcome:
        steps = tuple(int(one) for one in candidate.thrift)
        return Outcome(int(memory[steps]), CAPACITY, seconds=(seconds[steps], seconds[steps]))

    return evaluate


@pytest.mark.parametrize("seed", range(40))
def test_the_best_is_that_of_asking_for_everything(seed: int) -> None:
    sizes = (4, 2, 2, 4)
    evaluate = monotone(seed, sizes)
    candidates = lattice(sizes=sizes)
    found, asked = searched(candidates, evaluate, best=1)
    every = [Tried(one, evaluate(one)) for one in candidates]
    fitting = sorted((one for one in every if one.outcome.fits), key=lambda one: score(one, "time"))
    assert (found.best is None) == (not fitting)
    if found.best is not None:
        assert score(found.best, "time") == score(fitting[0], "time")
    assert len(asked) < len(candidates)
    # What no more was asked for because it cannot fit does not fit.
    assert found.cannot_fit <= sum(not one.outcome.fits for one in every)


def test_what_is_asked_for_does_not_depend_on_anything_but_the_answers() -> None:
    orders = [searched(lattice(sizes=(4, 2, 2, 4)), monotone(3, (4, 2, 2, 4)))[1] for _ in range(2)]
    assert orders[0] == orders[1]


def test_a_family_whose_thriftiest_does_not_fit_costs_one_question() -> None:
    hopeless = lattice("ddp")
    found, asked = searched(
        [*hopeless, *lattice()], lambda one: Outcome(200, 100) if one.family == "ddp" else planted(one)
    )
    assert sum(one.family == "ddp" for one in asked) == 1
    assert found.best is not None and found.best.candidate.family == "fsdp"
    assert found.cannot_fit >= len(hopeless) - 1


def test_what_lacks_a_node_s_memory_closes_only_what_lies_there_too() -> None:
    def evaluate(candidate: Candidate) -> Outcome:
        return Outcome(50, CAPACITY, host_bytes=90 * candidate.hosted, host_capacity=80, seconds=(1, 1))

    found, _ = searched(lattice(), evaluate)
    assert found.best is not None and found.best.candidate.hosted == 0
    assert all(one.candidate.hosted for one in found.unfit)


def test_what_cannot_be_is_counted_by_its_reason_and_closes_nothing() -> None:
    def evaluate(candidate: Candidate) -> Outcome:
        return Outcome(reason="heads") if candidate.thrift[0] == 3 else planted(candidate)

    found, _ = searched(lattice(), evaluate)
    assert found.best is not None and found.best.candidate.thrift == (2.0, 0.0, 0.0, 2.0)
    assert set(found.refused) == {"heads"}


def test_when_the_time_is_up_what_is_left_is_said() -> None:
    ticks = itertools.count()
    found, asked = searched(lattice(), planted, seconds=5, clock=lambda: float(next(ticks)))
    assert 1 <= len(asked) < 6
    assert found.left_out > 0


@pytest.mark.parametrize(("by", "expected"), [("time", 16), ("cost", 8), ("gpus", 8)])
def test_ranked_by_time_cost_or_ranks(by: str, expected: int) -> None:
    def evaluate(candidate: Candidate) -> Outcome:
        seconds = 10.0 if candidate.processes == 8 else 6.0
        cost = seconds * candidate.processes
        return Outcome(10, CAPACITY, seconds=(seconds, seconds), usd=(cost, cost))

    both = [Candidate("fsdp", (float(world), 0, 0, 0), (), world) for world in (8, 16)]
    found, _ = searched(both, evaluate, by=by)
    assert found.best is not None and found.best.candidate.processes == expected


def test_several_of_the_best_are_found_where_they_are_wanted() -> None:
    candidates = lattice()
    free = [one for one in candidates if one.thrift[1:] == (0, 0, 0)]
    found, _ = searched(candidates, lambda one: Outcome(1, CAPACITY, seconds=(1 + one.thrift[0], 1 + one.thrift[0])))
    assert found.ranked[0].candidate == free[0]
    assert [one.candidate for one in found.ranked if one.candidate in free] == free


WORLDS = [1, 2, 4, 8, *range(16, 1025, 8)]


@pytest.mark.parametrize("least", [1, 8, 16, 24, 64, 1000, 1024])
def test_the_fewest_ranks_are_found_in_a_few_questions(least: int) -> None:
    asked: list[int] = []

    def fits(world: int) -> bool:
        asked.append(world)
        return world >= least

    assert fewest(WORLDS, lambda world: [world], fits) == (least, least)
    assert len(asked) <= 2 * math.ceil(math.log2(len(WORLDS)))


def test_a_few_questions_say_that_not_even_all_ranks_suffice() -> None:
    asked: list[int] = []
    assert fewest(WORLDS, lambda world: [world], lambda one: bool(asked.append(one))) is None
    assert asked[-1] == 1024 and len(asked) <= math.log2(len(WORLDS)) + 2


def test_any_of_the_thriftiest_of_a_world_may_be_the_one_that_fits() -> None:
    found = fewest(
        [1, 2, 4], lambda world: [("tensor", world), ("sequence", world)], lambda one: one == ("sequence", 4)
    )
    assert found == (4, ("sequence", 4))


def moves() -> Iterator[Move[int]]:
    for label, saved in (("checkpointing", 30), ("micro", 10), ("shard", 25), ("offload", 60)):
        yield Move(label, frozenset({label}), saved)


def sufficing(needed: int) -> Callable[[tuple[Move[int], ...]], bool]:
    return lambda chosen: sum(move.change for move in chosen) >= needed


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        (10, [("checkpointing",), ("micro",), ("shard",)]),
        (40, [("offload",), ("checkpointing", "micro"), ("checkpointing", "shard")]),
        (100, [("checkpointing", "micro", "offload"), ("checkpointing", "shard", "offload")]),
        (200, []),
    ],
)
def test_the_nearest_changes_that_suffice_are_named_and_none_that_holds_another(
    needed: int, expected: list[tuple[str, ...]]
) -> None:
    found = remedies(list(moves()), sufficing(needed))
    assert [tuple(move.label for move in chosen) for chosen in found] == expected


def test_changes_of_one_key_are_not_made_together() -> None:
    two = [Move("nodes 2", frozenset({"nodes"}), 10), Move("nodes 4", frozenset({"nodes"}), 30)]
    assert remedies(two, sufficing(40)) == []
