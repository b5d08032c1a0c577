"""The recipes that go on from the default run: they compose, run from what they are meant for, and can be set over."""

from __future__ import annotations

from pathlib import Path

import pytest

from loomtune import api
from loomtune.testing import toy
from loomtune.worker import execute
from loomtune_plugins.models.folders import TINY
from support import signals_kept

TEACHER = f"roles.teacher.model.path={TINY}"
RECIPES = {"sql_dpo": [], "sql_reward": [], "sql_distill": [TEACHER]}
QUICK = ["steps=2", "batch.size=2", "data.train=4", "data.validation=3", "data.test=2"]
ALONE = ["sharding=single", "tracker=[jsonl]", "launcher.procs=1"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_passes_every_check(recipe: str) -> None:
    plan = api.compose([f"recipe={recipe}", *RECIPES[recipe]])
    assert api.check(plan) == []
    assert plan.chosen("objective")["name"] == recipe.removeprefix("sql_")
    assert plan.chosen("data")["name"] == "sql_quiz"
    epochs = plan.root.steps * plan.root.batch.size / plan.chosen("data")["train"]
    assert epochs in (1, 2), "every question equally often"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default recipe, if a short one."""
    folder = tmp_path_factory.mktemp("default") / "sft"
    plan = api.compose(["recipe=sql_quiz", *QUICK, *ALONE, "evaluator=[]", f"run.dir={folder}"])
    with signals_kept():
        assert execute(plan, api.prepare(plan), toy.world())["status"] == "completed"
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_from_the_model_of_another_run(recipe: str, finished: Path, tmp_path: Path) -> None:
    start = [f"model.path={finished}", f"run.dir={tmp_path / recipe}", "evaluator=[heldout]"]
    plan = api.compose([f"recipe={recipe}", *RECIPES[recipe], *QUICK, *ALONE, *start])
    with signals_kept():
        result = execute(plan, api.prepare(plan), toy.world())
    assert result["status"] == "completed" and result["metrics"]["heldout_loss"] >= 0


def test_an_objective_in_the_place_of_a_recipes_own_leaves_that_ones_settings_behind() -> None:
    """So is the control made that the measurements compare with."""
    plan = api.compose(["recipe=sql_dpo", "objective=sft", "loss=[]"])
    assert api.check(plan) == [] and "beta" not in plan.chosen("objective")
    assert plan.root.steps == api.compose(["recipe=sql_dpo"]).root.steps
