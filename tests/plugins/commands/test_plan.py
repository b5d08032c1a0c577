"""`loomtune plan`: what it says, to a person and to a program, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune_plugins.commands.plan.foreseen import affordable
from loomtune_plugins.commands.plan.worlds import World, placed
from plans import PARAMETERS, called, plant

RECIPE = ["recipe=llama3_70b_full_fsdp", "data.path=rows.jsonl", "batch.micro=2"]
ISSUE = ["plan", *RECIPE, "launcher.nodes=8", "launcher.procs=8", "hardware=h100_80gb"]


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Plan]]:
    yield plant(monkeypatch)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert called(*words, "--json") == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_recipe_is_planned_without_gpus_weights_or_rows(
    rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(capsys, *ISSUE)
    assert found["fits"] is True
    assert found["world"] == {"processes": 64, "nodes": 8, "processes_per_node": 8, "rank": 0}
    assert found["model"]["shape"] == "llama3_70b" and found["model"]["parameters"] == PARAMETERS
    assert any("Meta-Llama-3-70B is not here; planned by model=llama3_70b" in note for note in found["notes"])
    memory = found["memory"]
    assert memory["peak_bytes"] == sum(memory["causes_bytes"].values()) == memory["moments"]["backward"]["bytes"]
    assert memory["free_bytes"] == memory["capacity_bytes"] - memory["peak_bytes"] > 0
    assert len(rehearsals) == 1 and rehearsals[0].chosen("model")["shape"]["num_hidden_layers"] == 80


def test_every_number_has_its_unit_in_its_name_and_every_range_two_ends(
    rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(capsys, *ISSUE, "steps=100")
    low, high = found["time"]["step_seconds"]
    assert 0 < low < high
    assert found["time"]["total_seconds"][0] == pytest.approx(100 * low, rel=0.1)
    assert found["time"]["tokens_per_second"][0] == pytest.approx(found["step"]["tokens"] / high)
    assert found["cost"]["device_hours"][1] == pytest.approx(64 * found["time"]["total_seconds"][1] / 3600)
    assert all(0 < share < 1 for share in found["compute"]["mfu"])
    assert found["communication"]["sent_bytes_between_nodes_per_step"] > 0
    assert found["checkpoint"]["bytes"] > 12 * PARAMETERS


def test_the_arithmetic_adds_up(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, *ISSUE)
    lines = {line["what"]: line for line in found["arithmetic"]}
    assert sum(lines[cause]["bytes"] for cause in found["memory"]["causes_bytes"]) == lines["peak"]["bytes"]
    assert lines["left"]["bytes"] == found["memory"]["free_bytes"]
    assert lines["optimizer"]["reasoning"].startswith("8.00 bytes for each of 70,553,706,496 parameters")


def test_what_does_not_fit_ends_with_1(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "plan", *RECIPE, "hardware=h100_80gb", "launcher.nodes=1", code=1)
    assert (found["fits"], found["world"]["processes"]) == (False, 8)
    assert found["memory"]["free_bytes"] < 0
    assert [line["what"] for line in found["arithmetic"]][-1] == "lacking"


def test_a_person_reads_a_table(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    assert called(*ISSUE) == 0
    shown = capsys.readouterr().out
    for part in ("fits: yes", "64 processes, 8 on each of 8 nodes", "optimizer", "backward", "all_gather", "mfu_palm"):
        assert part in shown


def test_without_hardware_memory_is_said_and_how_to_get_the_rest(
    rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("plan", *RECIPE, "--world", "64") == 0
    assert "hardware=h100_80gb" in capsys.readouterr().out
    found = said(capsys, "plan", *RECIPE, "--world", "64")
    assert found["memory"]["peak_bytes"] > 0 and found["compute"]["mfu_flops_per_step"] > 0
    assert (found["fits"], found["time"], found["cost"], found["hardware"]) == (None, None, None, None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hardware=h100_80gb", "--world", "64"], 64),
        (["hardware=h100_80gb"], 8),
        (["hardware=h100_80gb", "launcher.nodes=2"], 16),
        (["hardware=h100_80gb", "launcher.nodes=2", "launcher.procs=4"], 8),
        (["hardware=h100_80gb", "launcher=slurm", "launcher.nodes=3", "launcher.procs=8"], 24),
        (["launcher.procs=3"], 3),
    ],
)
def test_the_world_is_the_launcher_s_or_a_process_for_each_device_of_the_nodes(
    words: list[str], told: int, rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    called("plan", *RECIPE, *words, "--json")
    assert json.loads(capsys.readouterr().out)["world"]["processes"] == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hardware=h1000"], "no hardware is called 'h1000'"),
        (["--world", "12", "sharding.replicate=8"], "12 processes cannot be divided"),
        (["--world", "0"], "has no process"),
        (["model.path=nobody/knows-it", "--world", "8"], "no shape of that origin is shipped"),
        (["model.path=/not/there", "--world", "8"], "no model folder"),
        (["hardware=h100_80gb", "launcher.procs=16"], "launcher.procs=16 on nodes of 8"),
        (["--world", "8", "--rank", "8"], "--rank 8 is none of 8"),
        (["--world", "8", "--search"], "no hardware is named"),
        (["hardware=h100_80gb", "--search", "colour"], "no axis is called colour"),
        (["hardware=h100_80gb", "--search", "micro", "--seconds", "-1"], "--seconds -1"),
        (["hardware=h100_80gb", "--picture", "/not/there/plan.svg"], "no folder /not/there"),
        (["hardware=h100_80gb", "hardware.tflops.bf17=3"], "hardware.tflops.bf17"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_its_cure(
    words: list[str], told: str, rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("plan", *RECIPE, *words) == 2
    error = capsys.readouterr().err
    assert told in error and "cure:" in error


def test_processes_of_a_cpu_share_it() -> None:
    plan = api.compose([*RECIPE, "hardware=cpu_laptop"], processes=4)
    one, four = (placed(plan, World(count, count)).root.hardware for count in (1, 4))
    assert (one.memory_gib, four.memory_gib) == (14, 3.5)
    assert four.tflops["fp32"] == pytest.approx(one.tflops["fp32"] / 4)
    assert placed(placed(plan, World(4, 4)), World(4, 4)).root.hardware == four


def test_generation_is_said_to_be_in_no_figure(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "recipe=llama3_8b_grpo", "data.path=rows.jsonl", "batch.micro=1", "hardware=h100_80gb"]
    assert any(line.startswith("generation") for line in said(capsys, *words, code=1)["unknown"])


def test_rows_that_cannot_be_read_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model=llama_1m", "data=jsonl", "data.path=/not/there.jsonl", "max_length=64", "steps=1"]
    assert any("/not/there.jsonl" in note for note in said(capsys, "plan", *small, "--world", "1")["notes"])


def test_the_picture_is_svg_of_every_moment(
    rehearsals: list[Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "memory.svg"
    assert called(*ISSUE, "--picture", str(file)) == 0
    assert ElementTree.parse(file).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("rows", "one", "two", "expected"), [(1, 90, 90, 1), (8, 20, 25, 8), (8, 50, 60, 4), (8, 90, 99, 1)]
)
def test_auto_takes_as_many_rows_as_grow_evenly_into_what_there_is(
    rows: int, one: int, two: int, expected: int
) -> None:
    assert affordable(lambda count: {1: one, 2: two}[count], rows, 80) == expected


def test_auto_is_found_from_one_row_and_two(rehearsals: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in ISSUE if not word.startswith("batch.micro")]
    found = said(capsys, *words)
    assert found["step"]["batch_micro"] == 2 == found["settings"]["batch_size"] // 64
    assert any("batch.micro=auto: 2 of a rank's 2 rows" in note for note in found["notes"])


def test_more_nodes_than_this_one_are_planned_for_and_not_started(tmp_path: Path) -> None:
    words = ["launcher.nodes=2", "launcher.procs=1", f"run.dir={tmp_path / 'run'}", "steps=1"]
    assert api.compose(words).processes == 2
    with pytest.raises(UserError, match=r"launcher\.nodes=2.*launcher=local") as refused:
        api.train(words)
    assert "launcher=ssh" in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("nodes", [0, -1])
def test_no_nodes_are_refused(nodes: int) -> None:
    with pytest.raises(UserError, match=r"launcher\.nodes"):
        api.compose([f"launcher.nodes={nodes}"])


def test_a_tiny_plan_is_rehearsed_in_earnest(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model=llama_1m", "data=jsonl", "data.path=rows.jsonl", "max_length=64", "sharding=fsdp", "steps=10"]
    found = said(capsys, "plan", *small, "batch.size=8", "batch.micro=1", "hardware=h100_80gb", "--world", "8")
    assert found["fits"] is True
    assert found["model"]["parameters"] == 1_040_768
    assert found["memory"]["kept_bytes"]["parameters"] >= 4 * 1_040_768 // 8
    assert {"all_gather", "reduce_scatter"} <= {one["operation"] for one in found["communication"]["by"]}
