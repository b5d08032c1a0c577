"""`loomtune plan --search` on planted rehearsals, whose best configuration is known, and on a small real one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loomtune import api
from loomtune.catalogue import installed
from loomtune.plan import Plan
from loomtune_plugins.commands.plan import space
from loomtune_plugins.commands.plan.foreseen import Oracle
from loomtune_plugins.commands.plan.searching import Evaluator, Seeker
from loomtune_plugins.commands.plan.worlds import World, placed, sizes, world
from plans import called, plant

WORDS = ["recipe=llama3_70b_full_fsdp", "data.path=rows.jsonl", "hardware=h100_80gb"]


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Plan]]:
    yield plant(monkeypatch)


def oracle(*words: str, processes: int = 64) -> Oracle:
    plan = api.compose([*WORDS, *words], processes=processes)
    return Oracle(plan, world(plan, installed(), processes))


def test_the_best_is_that_of_trying_everything(rehearsals: list[Plan]) -> None:
    axes = ("replicate", "checkpointing", "accumulation", "offload", "micro")
    asked = oracle()
    found = Seeker(asked, axes, "time", 1e9).seek()
    evaluate, own = Evaluator(asked), {"adapter": "full", "precision": "bf16"}
    every = [evaluate(one) for one in space.candidates(asked.plan, asked.world, axes, own)]
    quickest = min(one.seconds for one in every if one.fits and one.seconds)
    group = found["groups"][0]
    assert group["ranked"][0]["step_seconds"] == pytest.approx(list(quickest))
    assert group["tried"] < group["candidates"] == len(every)
    assert group["left_out"] == 0


def test_the_fewest_ranks_are_found_with_and_without_offload(rehearsals: list[Plan]) -> None:
    found = Seeker(oracle(), ("checkpointing", "accumulation", "offload", "micro"), "time", 1e9).seek()
    without, with_offload = found["fewest"]["without_offload"], found["fewest"]["with_offload"]
    # 16 bytes for each of 70.55 billion are 1,051 GiB: 14 devices of 79.1 by state alone, and whole nodes are 16.
    assert without["processes"] == 16
    assert "sharding.accumulate_sharded=false" not in without["set"]
    assert [line["what"] for line in without["arithmetic"]][-1] == "left"
    assert with_offload["processes"] < 16 and "sharding.offload=true" in with_offload["set"]


def test_what_is_not_searched_stays_as_it_was_said(rehearsals: list[Plan]) -> None:
    asked = oracle("batch.micro=2", "sharding.reshard=false")
    found = space.candidates(asked.plan, asked.world, ("checkpointing",), {})
    assert {dict(one.settings)["batch.micro"] for one in found} == {2}
    assert {dict(one.settings)["sharding.reshard"] for one in found} == {False}
    assert {dict(one.settings)["sharding.activation_checkpointing"] for one in found} == {False, True}
    assert len(found) == 2


def test_every_candidate_is_a_plan_that_passes_every_check(rehearsals: list[Plan]) -> None:
    asked = oracle()
    found = space.candidates(asked.plan, asked.world, space.LAYOUT, {})
    assert {one.family for one in found} == {"fsdp", "zero", "ddp"}
    for one in itertools.islice(found, 0, None, 97):
        api.check(space.changed(asked.plan, dict(one.settings), one.processes), simulated=True)
    assert len({(one.family, one.thrift) for one in found}) == len(found)


def test_what_is_typed_for_a_candidate_composes_to_it(rehearsals: list[Plan]) -> None:
    asked = oracle()
    found = space.candidates(asked.plan, asked.world, space.LAYOUT, {})
    for one in found[:: len(found) // 4]:
        typed = api.compose([*WORDS, *space.typed(asked.typed, one)], processes=64)
        assert typed.chosen("sharding") == space.changed(asked.typed, dict(one.settings), 64).chosen("sharding")
        assert typed.root.batch.micro == dict(one.settings)["batch.micro"]


def test_the_thriftiest_are_those_that_none_is_thriftier_than(rehearsals: list[Plan]) -> None:
    asked = oracle()
    lean = space.lean(space.candidates(asked.plan, asked.world, space.LAYOUT, {}), hosted=False)
    chosen = [dict(one.settings) for one in lean]
    assert all(one["sharding.activation_checkpointing"] and one["batch.micro"] == 1 for one in chosen)
    assert {one["sharding.stage"] for one in chosen if one["sharding"] == "zero"} == {3}
    assert not any(one.hosted for one in lean)


def test_other_maths_are_ranked_by_themselves_after_the_plan_s_own(rehearsals: list[Plan]) -> None:
    maths = list(space.maths(oracle().plan, ("adapter", "precision"), installed()))
    assert maths[0] == {"adapter": "full", "precision": "bf16"}
    assert {"adapter": "lora", "precision": "bf16"} in maths
    assert list(space.maths(oracle().plan, ("micro",), installed())) == maths[:1]


def test_worlds_are_parts_of_a_node_and_whole_nodes() -> None:
    assert list(sizes(8, 32)) == [1, 2, 4, 8, 16, 24, 32]


def test_a_plan_in_a_world_knows_how_many_ranks_a_node_has() -> None:
    plan = api.compose([*WORDS, "launcher.nodes=4", "launcher.procs=4"])
    assert placed(plan, world(plan, installed(), None)).root.hardware.per_node == 4
    assert World(20, 8).nodes == 3


COMMAND = ["plan", *WORDS, "launcher.nodes=8", "--search", "checkpointing,accumulation,micro,offload"]


def test_the_command_ranks_counts_and_draws(
    rehearsals: list[Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "search.svg"
    assert called(*COMMAND, "--picture", str(picture)) == 0
    shown = capsys.readouterr().out
    for part in (
        "best time first",
        "configurations tried",
        "fewest ranks without offload: 16",
        "fewest ranks with offload",
    ):
        assert part in shown
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_a_program_reads_the_same(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    assert called(*COMMAND, "--json", "--by", "cost") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["by"], found["world"]["processes"]) == ("cost", 64)
    assert all(row["fits"] for row in found["groups"][0]["ranked"])
    assert not any(row["fits"] for row in found["groups"][0]["unfit"])


def test_settings_may_follow_search_alone(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--search", *WORDS, "--world", "1", "adapter=lora", "--seconds", "0", "--json"]
    called(*words)
    assert json.loads(capsys.readouterr().out)["axes"] == [*space.LAYOUT, *space.MATHS]


def test_where_nothing_fits_the_exit_code_says_so(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("plan", *WORDS, "--world", "8", "--search", "checkpointing") == 1
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_search_in_earnest_finds_what_trying_everything_finds() -> None:
    words = ["model=llama_1m", "data=jsonl", "data.path=rows.jsonl", "max_length=256", "batch.size=16", "steps=10"]
    plan = api.compose([*words, "hardware=h100_80gb", "hardware.memory_gib=0.016"], processes=4)
    asked = Oracle(plan, world(plan, installed(), 4))
    axes = ("replicate", "checkpointing", "micro")
    group = Seeker(asked, axes, "time", 1e9).seek()["groups"][0]
    own = {"adapter": "full", "precision": plan.root.precision}
    every = [Evaluator(asked)(one) for one in space.candidates(asked.plan, asked.world, axes, own)]
    fitting = [one.seconds for one in every if one.fits and one.seconds]
    assert 0 < len(fitting) < len(every)
    assert group["ranked"][0]["step_seconds"] == pytest.approx(list(min(fitting, key=lambda one: one[0] * one[1])))
