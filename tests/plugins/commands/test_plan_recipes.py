"""The recipes of large models, planned for the world of their documented command and the devices that they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loomtune import api
from loomtune_plugins.commands.plan.described import described
from loomtune_plugins.commands.plan.foreseen import Oracle
from loomtune_plugins.commands.plan.worlds import World
from support import ROOT

EVERYDAY = ("llama3_8b_full_fsdp", "mixtral_8x7b_qlora")
"""The others are planned by `make recipes` too, which takes a quarter of an hour."""


def worlds() -> dict[str, int]:
    """Recipe to nodes of 8 processes, as docs/recipes.md types it."""
    text = (ROOT / Path("docs/recipes.md")).read_text().replace("\\\n", " ")
    found = re.findall(r"^torchrun --nnodes (\d+) --nproc-per-node 8 .* recipe=(\S+)", text, re.MULTILINE)
    return {recipe: int(nodes) for nodes, recipe in found}


RECIPES = [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow, id=name) for name in sorted(worlds())]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_planned_and_fits_what_it_is_for(recipe: str) -> None:
    nodes = worlds()[recipe]
    typed = [f"recipe={recipe}", "data.path=rows.jsonl", "hardware=h100_80gb", "batch.micro=1"]
    plan = api.compose([*typed, f"launcher.nodes={nodes}", "launcher.procs=8"], processes=8 * nodes)
    assert api.check(plan, simulated=True) == []
    said = described(Oracle(plan, World(8 * nodes, 8)).foresee())
    assert said["fits"] is True
    low, high = said["time"]["step_seconds"]
    assert 0 < low <= high and said["checkpoint"]["bytes"] > 0
