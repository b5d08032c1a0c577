"""The run from Python: what a resumed run takes over, what is refused before it starts, how it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.assembly import assemble
from loomtune.batching import micro_limit
from loomtune.catalogue import installed
from loomtune.contracts import JobSpec
from loomtune.errors import RunFailed, UserError
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.samplers import Packed
from loomtune.testing import toy
from loomtune_launchers.local import Local
from loomtune_plugins.trackers.jsonl import Jsonl
from loomtune_plugins.trackers.report import Report

Settings = list[str]


@pytest.fixture
def settings(tiny_model: Path, mixed_data: Path, tmp_path: Path) -> Settings:
    return [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", f"run.dir={tmp_path / 'run'}"]


@pytest.fixture
def resumed(settings: Settings) -> Callable[..., Plan]:
    """The plan of a run that was typed with `first` and goes on with `then`."""

    def of(first: Settings, then: Settings) -> Plan:
        folder = api.prepare(api.compose([*settings, *first]))
        return api.resumed(folder, then)

    return of


def test_a_resumed_run_keeps_what_was_typed(resumed: Callable[..., Plan], tmp_path: Path) -> None:
    plan = resumed(["optimizer.lr=3e-3", "steps=9", "sharding=ddp", "sharding.bucket_mb=7"], [])
    assert plan.chosen("optimizer")["lr"] == 3e-3
    assert (plan.chosen("sharding")["name"], plan.chosen("sharding")["bucket_mb"]) == ("ddp", 7)
    assert (plan.root.steps, plan.root.run.dir) == (9, str(tmp_path / "run"))


def test_an_early_end_is_not_inherited(resumed: Callable[..., Plan]) -> None:
    assert resumed(["stop_after=3"], []).root.stop_after == 0
    assert resumed(["stop_after=4"], ["stop_after=6"]).root.stop_after == 6


def test_another_choice_takes_the_settings_of_the_old_one_along(resumed: Callable[..., Plan]) -> None:
    plan = resumed(["sharding=ddp", "sharding.bucket_mb=7"], ["sharding=fsdp", "sharding.offload=true"])
    assert plan.chosen("sharding")["name"] == "fsdp" and plan.chosen("sharding")["offload"] is True


def test_a_root_setting_replaces_itself_alone(resumed: Callable[..., Plan]) -> None:
    plan = resumed(["checkpoint.every=3", "checkpoint.keep=5"], ["checkpoint.every=4"])
    assert (plan.root.checkpoint.every, plan.root.checkpoint.keep) == (4, 5)


def test_how_many_processes_is_the_launcher_s_affair_unless_they_are_there(settings: Settings) -> None:
    assert api.compose([*settings, "sharding=ddp", "launcher.procs=3"]).processes == 3
    assert api.compose([*settings, "sharding=single"]).processes == 1
    assert api.compose([*settings, "sharding=ddp", "launcher.procs=3"], processes=5).processes == 5


def test_faults_of_different_parts_are_told_together(settings: Settings) -> None:
    wrong = ["batch.size=0", "sharding=single", "launcher.procs=2", "optimizer.lr=-1", "model.path=/nowhere"]
    with pytest.raises(UserError) as refused:
        api.check(api.compose([*settings[1:], *wrong]))
    said = str(refused.value)
    for what in ("batch.size=0", "not on 2", "optimizer.lr=-1", "/nowhere"):
        assert what in said, what


def test_rows_that_an_objective_makes_itself_are_not_packed_beforehand_which_is_told_before_any_is_read(
    settings: Settings, tiny_model: Path
) -> None:
    online = ["objective=distill", f"roles.teacher.model.path={tiny_model}", "objective.on_policy=0.5", "packing=true"]
    with pytest.raises(UserError, match=r"makes its samples while it trains\n    cure: set batch.sampler=shuffled"):
        api.check(api.compose([*settings, *online, "batch.sampler=packed"]))
    api.check(api.compose([*settings, *online]))


def test_a_run_that_would_train_nothing_is_refused_before_it_has_a_folder(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"epochs=0.001 visits none of \d+ rows"):
        api.prepare(api.compose([*settings, "epochs=0.001"]))
    assert not (tmp_path / "run").exists()


def test_steps_of_packed_rows_are_counted_once_for_all_ranks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = api.prepare(api.compose([*settings, "packing=true", "batch.sampler=packed", "max_length=64"]))
    counted = json.loads((folder / "samples.json").read_text())["train"]["steps"]
    monkeypatch.setattr(Packed, "steps", lambda self: pytest.fail("a rank counts"))
    lease = Lease(folder, "reading")
    run = assemble(Plan.load(folder), folder, installed(), toy.world(), lease, observed=False).run
    assert run.steps == counted > 0


def test_a_packed_row_has_room_beside_the_tokens_that_an_adapter_puts_before_it(settings: Settings) -> None:
    folder = api.prepare(
        api.compose([*settings, "packing=true", "adapter=prompt", "adapter.length=5", "batch.micro=2"])
    )
    lease = Lease(folder, "reading")
    run = assemble(Plan.load(folder), folder, installed(), toy.world(), lease, observed=False).run
    assert micro_limit(run).packed == run.max_length == run.model.context() - 5


def test_a_length_beyond_the_model_s_context_is_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match="max_length=129 is longer than the model's context of 128"):
        api.prepare(api.compose([*settings, "max_length=129"]))


def test_rows_that_are_cut_are_counted(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    api.prepare(api.compose([*settings, "max_length=40", "objective.train_on=all"]))
    said = capsys.readouterr().err
    assert "rows of train lose" in said and "max_length=40" in said and "raise max_length" in said


def test_a_prepared_folder_has_all_that_ranks_need_and_no_old_result(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    plan = api.compose(settings)
    assert api.prepare(plan) == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "inputs.json",
        "plugins.json",
        "run.yaml",
        "samples.json",
    ]
    assert json.loads((folder / "plugins.json").read_text()) == dict(plan.versions)
    assert set(json.loads((folder / "samples.json").read_text())) == {"train"}


def launched(settings: Settings, monkeypatch: pytest.MonkeyPatch, leaves: dict[str, Any] | None) -> api.Result:
    def submit(self: Local, spec: JobSpec) -> str:
        if leaves is not None:
            (spec.run / "result.json").write_text(json.dumps(leaves))
        return "1"

    monkeypatch.setattr(Local, "submit", submit)
    plan = api.compose(settings)
    return api.launch(plan, api.prepare(plan))


def test_a_run_ended_as_its_result_says(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = {"status": "stopped", "step": 3, "metrics": {"loss": 1.5}, "error": None}
    assert launched(settings, monkeypatch, left) == api.Result(tmp_path / "run", "stopped", 3, {"loss": 1.5}, None)


def test_processes_that_leave_no_result_have_failed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match="ended without a result"):
        launched(settings, monkeypatch, None)


def test_a_run_folder_that_is_a_file_is_refused_with_the_cure(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        api.train([f"run.dir='{taken}'"])
    with pytest.raises(UserError, match=f"{taken} is a file"):
        api.train([f"run.dir='{taken}/below'"])
    assert taken.read_text() == "mine"


def test_a_run_folder_where_nothing_may_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, how: path != tmp_path)  # as on a read-only disk
    monkeypatch.setattr(api, "tokenise", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(UserError, match=f"{tmp_path}/runs/one: {tmp_path} may not be written to"):
        api.train([f"run.dir='{tmp_path}/runs/one'"])


def test_a_report_is_drawn_by_the_run_s_own_tracker_or_by_any_that_can(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = api.prepare(api.compose([*settings, "tracker=[jsonl]"]))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert api.report(folder) == folder / "report.html"
    assert "<svg" in (folder / "report.html").read_text()
    monkeypatch.setattr(Jsonl, "redraw", lambda self, folder: folder / "mine.txt")
    assert api.report(folder) == folder / "mine.txt"


def test_without_a_tracker_that_draws_there_is_no_report(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = api.prepare(api.compose(settings))
    monkeypatch.setattr(Report, "redraw", lambda self, folder: None)
    with pytest.raises(UserError, match="no tracker draws a report"):
        api.report(folder)
