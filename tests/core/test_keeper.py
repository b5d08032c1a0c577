"""What a run keeps, where it goes on from, and what is told about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loomtune import checkpoint, hookimpl
from loomtune.checkpoint import Manifest, Reader
from loomtune.contracts import RoleSpec
from loomtune.errors import CheckpointError, LeaseLost
from loomtune.events import Events
from loomtune.lease import Lease
from toys import Plain, Toy, TwoNetworks, made


class Listener:
    """Hears of checkpoints; may name the one to go on from."""

    def __init__(self, answer: Path | None = None) -> None:
        self.heard: list[tuple[str, str, int]] = []
        self.answer = answer

    @hookimpl
    def checkpoint_saved(self, path: Path, step: int) -> None:
        self.heard.append(("saved", path.name, step))

    @hookimpl
    def checkpoint_loaded(self, path: Path, step: int) -> None:
        self.heard.append(("loaded", path.name, step))

    @hookimpl
    def resume_point(self, run: Any) -> Path | None:
        return self.answer


def built(folder: Path, listener: Listener, **more: Any) -> Toy:
    toy = made(folder, events=Events([("listener", listener)]), **more)
    toy.assembly.build_roles()
    return toy


def saved(folder: Path, *steps: int, best: int = 0, listener: Listener | None = None) -> Toy:
    toy = built(folder, listener or Listener())
    for step in steps:
        toy.run.step = step
        toy.assembly.keeper.save({"fetched": 8 * step}, best=step == best)
    toy.assembly.keeper.finish()
    return toy


def test_a_new_run_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    listener = Listener()
    assert built(tmp_path, listener).assembly.keeper.restore() is False
    assert listener.heard == []


def test_a_save_is_told_once_it_is_committed(tmp_path: Path) -> None:
    listener = Listener()
    toy = built(tmp_path, listener)
    toy.run.step = 3
    toy.assembly.keeper.save({}, best=False)
    assert toy.assembly.keeper.ready() and listener.heard == []
    toy.assembly.keeper.finish()
    assert listener.heard == [("saved", "step-00000003", 3)]
    toy.assembly.keeper.finish()
    assert len(listener.heard) == 1


def test_the_latest_is_gone_on_from_with_the_loop_s_state(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    toy = built(tmp_path, listener := Listener())
    assert toy.assembly.keeper.restore() is True
    assert toy.run.step == 4
    assert toy.assembly.keeper.state == {"step": 4, "fetched": 32, "seed": 0}
    assert listener.heard == [("loaded", "step-00000004", 4)]


def test_a_plugin_may_name_another(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    toy = built(tmp_path, Listener(tmp_path / "checkpoints" / "step-00000002"))
    assert toy.assembly.keeper.restore() is True
    assert toy.run.step == 2


def test_a_checkpoint_of_another_run_is_refused_naming_both(tmp_path: Path) -> None:
    other = saved(tmp_path / "other", 2)
    named = other.run.folder / "checkpoints" / "step-00000002"
    same = built(tmp_path / "copy", Listener(named))
    assert same.assembly.keeper.restore() is True, "a run's checkpoint may lie anywhere"
    toy = built(tmp_path / "mine", listener := Listener(named), steps=9)
    before = toy.weights()
    with pytest.raises(
        CheckpointError, match=rf"of run {other.run.plan.hash}, this is run {toy.run.plan.hash}.*\n.*cure"
    ):
        toy.assembly.keeper.restore()
    assert listener.heard == [] and toy.run.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.weights().items())


def test_a_checkpoint_without_the_optimizer_s_state_does_not_begin_its_moments_anew(tmp_path: Path) -> None:
    toy = saved(tmp_path, 2)
    path = tmp_path / "checkpoints" / "step-00000002"
    manifest = Manifest.read(path)
    lost = sorted({known[2] for known in manifest.index} - {"weight"})
    for known in [known for known in manifest.index if known[2] in lost]:
        del manifest.index[known]
    (path / "manifest.json").unlink()
    manifest.write(path)
    with pytest.raises(CheckpointError, match=f"holds no {lost[0]} of policy's"):
        toy.assembly.keeper.load(path)
    (engine,) = toy.run.trained_engines()
    engine.load(Reader(path).read("policy"), optimizer=False)  # weights alone are there


def test_what_was_just_saved_counts_when_a_run_goes_back(tmp_path: Path) -> None:
    toy = saved(tmp_path, 2)
    toy.run.step = 4
    toy.assembly.keeper.save({}, best=False)
    assert toy.assembly.keeper.restore() is True
    assert toy.run.step == 4


def test_only_a_committed_best_is_marked(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, 4, 6, 8, 10, best=4).run.folder / "checkpoints"
    assert checkpoint.best(folder) == folder / "step-00000004"
    kept = sorted(path.name for path in folder.glob("step-*"))
    assert kept == ["step-00000004", "step-00000008", "step-00000010"]


class Shared(TwoNetworks):
    """A frozen reference beside two trained roles."""

    def roles(self) -> dict[str, RoleSpec]:
        return {"reference": RoleSpec(trained=False), **super().roles()}


def test_each_trained_engine_is_kept_under_the_first_role_that_it_serves(tmp_path: Path) -> None:
    toy = built(tmp_path, Listener(), objective=Shared())
    toy.run.step = 1
    toy.assembly.keeper.save({}, best=False)
    toy.assembly.keeper.finish()
    manifest = Reader(tmp_path / "checkpoints" / "step-00000001").manifest
    assert {role for role, _, _ in manifest.index} == {"policy", "value"}


def test_a_superseded_attempt_cannot_commit(tmp_path: Path) -> None:
    toy = built(tmp_path, listener := Listener(), objective=Plain())
    toy.run.step = 1
    toy.assembly.keeper.save({}, best=False)
    Lease.take(tmp_path)
    with pytest.raises(LeaseLost):
        toy.assembly.keeper.finish()
    assert listener.heard == [] and checkpoint.latest(tmp_path / "checkpoints") is None


def test_two_trained_networks_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", TwoNetworks(), steps=6)
    assert whole.train() == "completed"
    assert made(tmp_path / "parts", TwoNetworks(), steps=6, stop_after=3).train() == "stopped"
    resumed = made(tmp_path / "parts", TwoNetworks(), steps=6)
    assert resumed.train() == "completed"
    assert resumed.diary.steps == whole.diary.steps[3:]
    policy, value = whole.weights("policy"), whole.weights("value")
    assert not torch.equal(policy["head.weight"], value["head.weight"]), "each has learned something of its own"
    for role in ("policy", "value"):
        ours, theirs = resumed.weights(role), whole.weights(role)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
