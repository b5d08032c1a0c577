"""What a run gives its plugins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loomtune.contracts import Completion, LossSums, Role, RoleSpec, Rollout, Sampling
from loomtune.errors import Preempted, UserError
from loomtune.testing import toy as toys
from loomtune.world import World
from toys import Plain, Scripted, Toy, TwoNetworks, made


def built(folder: Path, **parts: Any) -> Toy:
    toy = made(folder, parts.pop("objective", TwoNetworks()), **parts)
    toy.assembly.build_roles()
    return toy


class WithReference(TwoNetworks):
    def roles(self) -> dict[str, RoleSpec]:
        return {"reference": RoleSpec(trained=False), **super().roles()}


def test_the_engines_that_take_steps_are_those_of_trained_roles_each_once(tmp_path: Path) -> None:
    run = built(tmp_path, objective=WithReference()).run
    policy, value = run.roles["policy"].engine, run.roles["value"].engine
    assert run.trained_engines() == [policy, value]
    assert run.policy is run.roles["policy"]
    run.roles["value"] = Role("value", policy, head="value")
    assert run.trained_engines() == [policy]


def test_rows_that_stream_are_never_measured_as_if_their_head_were_all(tmp_path: Path) -> None:
    run = built(tmp_path, data=SimpleNamespace(window=4)).run
    with pytest.raises(UserError, match="training rows stream"):
        run.batches("train")


def test_terms_are_divided_by_their_weights_and_joined_by_engine(tmp_path: Path) -> None:
    run = built(tmp_path).run
    result = LossSums({"loss": torch.tensor(6.0), "second": torch.tensor(10.0)})
    totals = {"loss": 3.0, "second": 4.0}
    apart = run.losses(result, totals)
    assert [float(loss) for _, loss in apart] == [2.0, 2.5]
    assert [engine for engine, _ in apart] == run.trained_engines()
    run.roles["value"] = run.roles["policy"]
    assert [float(loss) for _, loss in run.losses(result, totals)] == [4.5]


def test_a_term_that_weighs_nothing_in_the_whole_step_counts_nothing(tmp_path: Path) -> None:
    result = LossSums({"loss": torch.tensor(6.0), "second": torch.tensor(10.0)})
    assert [float(loss) for _, loss in built(tmp_path).run.losses(result, {"loss": 3.0, "second": 0.0})] == [2.0, 0.0]


class Echo(Rollout):
    """Completes each prompt with its own first token, and notes what this rank was given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.keys: list[int] = []
        self.lengths: list[int] = []

    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> list[Completion]:
        self.given += [list(prompt) for prompt in prompts]
        self.keys += keys
        self.lengths.append(sampling.max_length)
        return [Completion([prompt[0], 99]) for prompt in prompts]


class Peer(World):
    """The second of two replicas, whose peer's part is known."""

    def gather(self, thing: Any) -> list[Any]:
        return [(0, [Completion([number, 99]) for number in (10, 12, 14)]), thing]


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_prompts_are_shared_out_and_their_completions_come_back_in_order(count: int, tmp_path: Path) -> None:
    toy = made(tmp_path, Plain(), rollout=(echo := Echo()))
    toy.assembly.build_roles()
    prompts = [[10 + number] for number in range(count)]
    assert toy.run.generate(prompts, Sampling(max_tokens=2)) == [[10 + number, 99] for number in range(count)]
    assert echo.given == prompts


def test_a_replica_generates_for_its_own_prompts(tmp_path: Path) -> None:
    world = Peer(1, 2, 0, torch.device("cpu"), replica=1, replicas=2)
    toy = made(tmp_path, Plain(), rollout=(echo := Echo()), world=world)
    toy.assembly.build_roles()
    prompts = [[10], [11], [12], [13], [14]]
    found = toy.run.begin(prompts, [5, 6, 7, 8, 9], Sampling(max_tokens=2))()
    assert echo.given == [[11], [13]] and echo.keys == [6, 8]
    assert found == [Completion([10 + number, 99]) for number in range(5)]
    random.seed(4)
    toy.run.generate(prompts, Sampling(max_tokens=2))
    random.seed(4)
    toy.run.generate(prompts, Sampling(max_tokens=2))
    assert echo.keys[2:4] == echo.keys[4:] and len(set(echo.keys)) == 4


@pytest.mark.parametrize(("asked", "given"), [(0, 250), (100, 100), (1000, 250)])
def test_nothing_is_generated_beyond_the_context_that_an_adapter_leaves(asked: int, given: int, tmp_path: Path) -> None:
    toy = made(tmp_path, Plain(), rollout=(echo := Echo()))
    toy.assembly.build_roles()
    toy.run.virtual_tokens = toys.CONTEXT - 250
    toy.run.generate([[10]], Sampling(max_tokens=2, max_length=asked))
    assert echo.lengths == [given]


class Counting:
    """Rows that are counted as they are read."""

    def __init__(self) -> None:
        self.read = 0

    def rows(self, split: str) -> Any:
        for number in range(100):
            self.read += 1
            yield {"number": number}


def test_rows_are_read_no_further_than_asked(tmp_path: Path) -> None:
    run = made(tmp_path, data=(data := Counting())).run
    assert [row["number"] for row in run.rows("train", 3)] == [0, 1, 2]
    assert data.read == 3
    assert len(run.rows("train")) == 100


def test_only_one_rank_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = toys.world()
    for world in (first, replace(first, rank=1)):
        made(tmp_path, world=world).run.tell_once("half-way")
    assert capsys.readouterr().err == "loomtune: half-way\n"


class Asked(World):
    """One of two ranks, of which the other was asked to leave."""

    def total(self, numbers: Sequence[float]) -> list[float]:
        return [number + 1.0 for number in numbers]


def test_who_hears_that_another_was_asked_to_leave_leaves_too(tmp_path: Path) -> None:
    alone = made(tmp_path / "alone").run
    alone.heed()
    alone.stop.asked = True
    with pytest.raises(Preempted, match="during an evaluation"):
        alone.heed()
    with pytest.raises(Preempted, match="before"):
        made(tmp_path / "two", world=Asked(0, 2, 0, torch.device("cpu"))).run.heed("asked before")


def test_guards_hear_of_every_piece_that_all_ranks_have_done(tmp_path: Path) -> None:
    class Waiting(Scripted):
        heard = 0

        def waits(self) -> None:
            self.heard += 1

    run = made(tmp_path, guards=[guard := Waiting()]).run
    run.heed()
    run.heed()
    assert guard.heard == 2
    run.stop.asked = True
    with pytest.raises(Preempted):
        run.heed()
    assert guard.heard == 2
