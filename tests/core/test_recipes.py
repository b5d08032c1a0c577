"""The recipes of large models: they compose, fit the worlds of their commands, and are one run in four layouts."""

from __future__ import annotations

import dataclasses
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from loomtune import api, cli
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune.testing import toy
from loomtune.worker import execute
from support import ROOT, signals_kept

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"name": "fsdp", "offload": False},
    "hsdp": {"name": "fsdp", "offload": False},
    "zero3": {"name": "zero", "stage": 3, "offload": "none"},
    "zero3_offload": {"name": "zero", "stage": 3, "offload": "all"},
}
MODELS = {
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_70b": "meta-llama/Meta-Llama-3-70B",
    "qwen2_5_32b": "Qwen/Qwen2.5-32B",
    "qwen2_5_72b": "Qwen/Qwen2.5-72B",
    "mixtral_8x7b": "mistralai/Mixtral-8x7B-v0.1",
}
WORLDS = {"llama3_8b": 8, "llama3_70b": 64, "qwen2_5_32b": 32, "qwen2_5_72b": 64, "mixtral_8x7b": 32}
ONE_NODE = {"lora": ("adapter", "lora"), "qlora": ("adapter", "qlora")}
METHODS = {**ONE_NODE, "dpo": ("objective", "dpo"), "grpo": ("objective", "grpo")}
EVERY = pytest.mark.parametrize(("size", "layout"), [(size, layout) for size in WORLDS for layout in LAYOUTS])
METHOD = pytest.mark.parametrize(("size", "method"), [(size, method) for size in WORLDS for method in METHODS])


@cache
def composed(size: str, layout: str, *more: str, world: int = 0) -> Plan:
    typed = [f"recipe={size}_{layout if layout in METHODS else f'full_{layout}'}", "data.path=rows.jsonl", *more]
    return api.compose(typed, processes=world or (8 if layout in ONE_NODE else WORLDS[size]))


@EVERY
def test_a_recipe_composes_and_passes_every_check_for_a_world_that_is_elsewhere(size: str, layout: str) -> None:
    assert api.check(composed(size, layout), simulated=True) == []


@METHOD
def test_a_recipe_of_a_method_does_too_and_is_of_that_method(size: str, method: str) -> None:
    plan = composed(size, method)
    axis, name = METHODS[method]
    assert plan.chosen(axis)["name"] == name and plan.chosen("model")["path"] == MODELS[size]
    assert api.check(plan, simulated=True) == []


@EVERY
def test_a_recipe_says_what_its_name_says(size: str, layout: str) -> None:
    plan = composed(size, layout)
    sharding = plan.chosen("sharding")
    assert {key: sharding[key] for key in LAYOUTS[layout]} == LAYOUTS[layout]
    assert sharding["activation_checkpointing"] is True
    assert sharding.get("replicate", 1) == (2 if layout == "hsdp" else 1)
    assert plan.chosen("adapter")["name"] == "full"
    assert plan.chosen("model")["path"] == MODELS[size]
    assert (plan.root.precision, plan.root.batch.size % WORLDS[size]) == ("bf16", 0)
    assert plan.root.checkpoint.every > 0


@pytest.mark.parametrize("size", WORLDS)
def test_the_four_of_a_size_are_the_same_run_so_that_one_goes_on_where_another_stopped(size: str) -> None:
    assert len({composed(size, layout).hash for layout in LAYOUTS}) == 1


def test_a_model_of_one_s_own_takes_the_place_of_the_hub_s() -> None:
    assert composed("llama3_70b", "zero3", "model.path=/models/llama").chosen("model")["path"] == "/models/llama"


@pytest.mark.parametrize(("size", "world", "nearest"), [("llama3_70b", 13, 1), ("llama3_8b", 7, 1)])
def test_a_world_that_copies_do_not_divide_is_refused_with_the_nearest_that_do(
    size: str, world: int, nearest: int
) -> None:
    with pytest.raises(
        UserError, match=rf"(?s){world} processes cannot be divided.*set sharding\.replicate={nearest}, "
    ):
        api.check(composed(size, "hsdp", world=world), simulated=True)


def test_other_faults_are_found_for_a_world_elsewhere_too() -> None:
    with pytest.raises(UserError) as refused:
        api.check(composed("llama3_70b", "zero3", "sharding.stage=0", "batch.size=0"), simulated=True)
    assert "sharding.stage=0" in str(refused.value) and "batch.size=0" in str(refused.value)


def test_files_are_asked_for_where_the_run_is_to_start_here(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        api.check(composed("llama3_8b", "fsdp", f"model.path={tmp_path / 'absent'}"))
    assert "no model folder" in str(refused.value) and "rows.jsonl" in str(refused.value)


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_a_dry_run_shows_a_recipe_for_a_world_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "recipe=llama3_70b_full_hsdp", "--dry-run", "--world", "64") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sharding.replicate=2  # recipe=llama3_70b_full_hsdp" in lines
    assert "precision=bf16  # recipe=llama3_70b_full_fsdp" in lines
    assert not any("would run" in line for line in lines), "the launcher of this machine starts no world elsewhere"


def test_a_dry_run_refuses_a_world_elsewhere_as_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "recipe=llama3_70b_full_hsdp", "sharding.replicate=8", "--dry-run", "--world", "12") == 2
    assert "set sharding.replicate=6" in capsys.readouterr().err


def test_nothing_starts_on_a_world_that_is_only_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "--world", "64") == 2
    assert "add --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("world", ["0", "-1"])
def test_a_world_without_a_process_is_refused(world: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "recipe=llama3_8b_full_fsdp", "--dry-run", "--world", world) == 2
    assert "has no process" in capsys.readouterr().err


CUT = ["train", "recipe=llama3_8b_full_fsdp", "--dry-run", "--world", "16", "sharding.tensor=16"]


def test_a_dry_run_refuses_a_model_that_cannot_be_cut_so_where_its_config_is_at_hand(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (["model=llama3_8b"], [f"model.path={tiny_model}"]):
        assert called(*CUT, *model) == 2
        assert "sharding.tensor" in capsys.readouterr().err
    assert called(*CUT[:-1], "sharding.tensor=8", "model=llama3_8b") == 0
    assert "not asked" not in capsys.readouterr().out


def test_a_dry_run_says_where_it_could_not_ask_that(capsys: pytest.CaptureFixture[str]) -> None:
    for model in ([], ["model.path=/not/there"], ["model=random", "model.config=/not/there.json"]):
        assert called(*CUT, *model) == 0
        assert "not asked: whether the model can be laid out so" in capsys.readouterr().out


ALIKE = ("llama3_70b", "qwen2_5", "mixtral")
"""Their recipes differ from those of `llama3_8b` in numbers alone."""

ALL = sorted(path.stem for path in (ROOT / "conf" / "loomtune_conf" / "recipe").glob("*.yaml"))
RECIPES = [name for name in ALL if not name.startswith(ALIKE)]


@cache
def of_recipe(recipe: str, *more: str) -> Plan:
    rows = ["data.path=rows.jsonl"] if recipe.startswith(tuple(MODELS)) else []
    return api.compose([f"recipe={recipe}", *rows, *more])


@pytest.mark.parametrize("sharding", installed().names("sharding"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_with_every_sharding(recipe: str, sharding: str) -> None:
    plan, usual = of_recipe(recipe, f"sharding={sharding}"), of_recipe(recipe)
    if usual.chosen("sharding")["name"] == sharding:
        assert plan.chosen("sharding") == usual.chosen("sharding")
    else:
        schema = installed().find("sharding", sharding).offer.schema
        assert plan.chosen("sharding") == {**dataclasses.asdict(schema()), "name": sharding}
    assert plan.hash == usual.hash


def test_a_run_of_a_recipe_goes_on_and_is_measured_under_another_sharding(
    tiny_model: Path, mixed_data: Path, tmp_path: Path
) -> None:
    small = [f"model.path={tiny_model}", f"data.path={mixed_data}", "data.holdout_rows=4", "evaluator=[heldout]"]
    small += ["max_length=64", "batch.size=4", "steps=1", "tracker=[]", "precision=fp32", f"run.dir='{tmp_path}/run'"]
    plan = api.compose(["recipe=llama3_8b_full_hsdp", *small], processes=2)
    assert plan.chosen("sharding")["replicate"] == 2
    folder = api.prepare(plan)
    alone = api.resumed(folder, ["sharding=single", "launcher.procs=1"])
    with signals_kept():
        assert execute(alone, folder, toy.world())["status"] == "completed"
    assert api.evaluate(folder)["heldout_loss"] > 0


def documented() -> dict[str, tuple[int, list[str]]]:
    """Recipe to (world size, overrides) of every torchrun command in docs/recipes.md."""
    text = (ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^ *(torchrun .*)$", text, re.MULTILINE)]
    found = {}
    for command in commands:
        flags = {flag: command[command.index(flag) + 1] for flag in ("--nnodes", "--nproc-per-node", "--rdzv-endpoint")}
        overrides = command[command.index("loomtune.train") + 1 :]
        recipe = next(text.removeprefix("recipe=") for text in overrides if text.startswith("recipe="))
        found[recipe] = (int(flags["--nnodes"]) * int(flags["--nproc-per-node"]), overrides)
    return found


@EVERY
def test_the_documented_command_of_a_recipe_passes_every_check(size: str, layout: str) -> None:
    world, overrides = documented()[f"{size}_full_{layout}"]
    assert world == WORLDS[size]
    assert {text.partition("=")[0] for text in overrides} >= {"model.path", "data.path", "run.dir"}
    assert api.check(api.compose(overrides, processes=world), simulated=True) == []


@METHOD
def test_the_documented_command_of_a_method_s_recipe_does_too(size: str, method: str) -> None:
    world, overrides = documented()[f"{size}_{method}"]
    assert world == (8 if method in ONE_NODE else WORLDS[size])
    assert {text.partition("=")[0] for text in overrides} >= {"model.path", "data.path", "run.dir"}
    assert api.check(api.compose(overrides, processes=world), simulated=True) == []
