"""From a plan to a run with all its parts, and from an objective's roles to engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.assembly import Assembly, assemble
from loomtune.catalogue import installed
from loomtune.contracts import RoleSpec
from loomtune.errors import UserError
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.testing import toy
from loomtune.world import World
from toys import Plain, made


class Roles(Plain):
    """A policy with its frozen twin, and a value model that starts from it too."""

    def roles(self) -> dict[str, RoleSpec]:
        return {
            "policy": RoleSpec(trained=True),
            "reference": RoleSpec(trained=False, twin_of="policy"),
            "value": RoleSpec(trained=True, head="score", twin_of="policy"),
        }


class Added(toy.ToyAdapter):
    """What an adapter says that leaves the base alone."""

    saves_base = False


def test_where_the_base_is_trained_every_role_has_an_engine(tmp_path: Path) -> None:
    roles = built(tmp_path, toy.ToyAdapter())
    assert len({id(role.engine) for role in roles.values()}) == 3
    assert roles["reference"].engine.spec.optimizer is None
    assert roles["value"].engine.spec.heads == ("score",)
    assert all(role.adapter for role in roles.values())


def test_with_an_adapter_twins_are_views_of_one_engine(tmp_path: Path) -> None:
    roles = built(tmp_path, Added())
    assert len({id(role.engine) for role in roles.values()}) == 1
    assert {name: (role.adapter, role.head) for name, role in roles.items()} == {
        "policy": (True, "lm"),
        "reference": (False, "lm"),
        "value": (True, "score"),
    }
    assert roles["policy"].engine.spec.heads == ("lm", "score")


class Sharing(Roles):
    """The value is a head on the policy's own network."""

    def roles(self) -> dict[str, RoleSpec]:
        return {**super().roles(), "value": RoleSpec(trained=True, head="score", twin_of="policy", shares=True)}


def test_a_role_that_shares_is_a_view_of_its_twin_whatever_is_trained(tmp_path: Path) -> None:
    roles = built(tmp_path, toy.ToyAdapter(), Sharing())
    assert roles["value"].engine is roles["policy"].engine is not roles["reference"].engine
    assert roles["policy"].engine.spec.heads == ("lm", "score") and roles["value"].adapter


def built(folder: Path, adapter: Any, objective: Any = None) -> Any:
    made_up = made(folder, objective or Roles(), adapter=adapter)
    made_up.assembly.build_roles()
    return made_up.run.roles


Assembled = Callable[..., Assembly]


@pytest.fixture
def assembled(tiny_model: Path, mixed_data: Path, tmp_path: Path) -> Assembled:
    """Assembles a run of the tiny model on 61 rows, without starting it."""

    def of(*overrides: str, world: World | None = None, observed: bool = True) -> Assembly:
        given = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "sharding=single"]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        plan = api.compose([*given, *overrides, f"run.dir={tmp_path / 'run'}"])
        folder = api.prepare(plan)
        return assemble(plan, folder, installed(), world or toy.world(), Lease(folder, "here"), observed=observed)

    return of


@pytest.mark.parametrize(
    ("settings", "steps", "rows"),
    [
        (["steps=5"], 5, 40),
        (["epochs=1"], 8, 61),
        (["epochs=2"], 16, 122),
        (["epochs=0.5", "batch.size=10"], 3, 30),
    ],
)
def test_steps_or_passes_say_how_far_a_run_goes(
    settings: list[str], steps: int, rows: int, assembled: Assembled
) -> None:
    run = assembled(*settings).run
    assert (run.steps, run.sampler.end) == (steps, rows)


def test_an_objective_that_makes_several_steps_of_a_batch_has_as_many_planned(
    assembled: Assembled, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loomtune_plugins.objectives.sft import Sft

    monkeypatch.setattr(Sft, "steps_per_batch", lambda self: 3)
    assert assembled("epochs=1").run.steps == 24
    assert assembled("steps=5").run.steps == 5


def test_files_are_written_on_one_rank_and_nobody_watches_a_measurement(assembled: Assembled) -> None:
    def listening(assembly: Assembly) -> list[str]:
        return [name for name, _ in assembly.run.events.manager.list_name_plugin() if name.startswith("tracker")]

    second = World(1, 1, 1, toy.world().device)
    assert listening(assembled("tracker=[jsonl]")) == ["tracker jsonl"]
    assert listening(assembled("tracker=[jsonl]", world=second)) == []
    assert listening(assembled("tracker=[jsonl]", observed=False)) == []


def test_every_plugin_hears_the_events(assembled: Assembled) -> None:
    heard = [name for name, _ in assembled().run.events.manager.list_name_plugin()]
    assert heard[: len(installed().sources)] == list(installed().sources)


def test_a_world_that_the_sharding_cannot_use_is_refused(assembled: Assembled) -> None:
    with pytest.raises(UserError, match="one process, not on 2"):
        assembled(world=World(0, 2, 0, toy.world().device))


def test_ranks_that_share_rows_are_counted_as_the_sharding_says(
    assembled: Assembled, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loomtune_plugins.shardings.single import Single

    monkeypatch.setattr(Single, "replicas", lambda self, world: (1, 4))
    world = assembled().run.world
    assert (world.replica, world.replicas) == (1, 4)


def test_the_plan_of_the_folder_is_the_one_that_is_assembled(assembled: Assembled, tmp_path: Path) -> None:
    assembly = assembled()
    assert Plan.load(tmp_path / "run").hash == assembly.run.plan.hash
    assert assembly.keeper.folder == tmp_path / "run" / "checkpoints"
