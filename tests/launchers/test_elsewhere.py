"""A run that goes elsewhere: here stands a folder with its plan, and nothing here is asked for but settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from launchers.kubelet import expanded, worker
from launchers.tools import Tool
from loomtune import api
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune_plugins.commands.train import train

THERE = ["model.path=/loomtune/models/x", "data=jsonl", "data.path=/loomtune/rows.jsonl", "steps=3"]
JOB = ["launcher=kubernetes", "launcher.volume=models", "launcher.labels={kueue.x-k8s.io/queue-name: q1}"]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    return Tool("kubectl", tmp_path, monkeypatch)


def test_what_is_not_here_is_not_asked_for(kubectl: Tool, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    result = api.train([*THERE, *JOB, f"run.dir={folder}"])
    assert (result.status, result.folder) == ("submitted", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["job.yaml", "launcher.json", "run.yaml"]
    manifest = yaml.safe_load((folder / "job.yaml").read_text())
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q1"}
    overrides = worker(expanded(manifest, node=0)[0])
    assert overrides == [*THERE, "launcher=local", "run.dir='/loomtune/runs/loomtune-mine'"]
    assert api.compose(overrides).hash == Plan.load(folder).hash


def test_a_run_goes_on_by_the_same_job_and_in_the_same_folder(kubectl: Tool, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    api.train([*THERE, *JOB, f"run.dir={folder}"])
    first = yaml.safe_load((folder / "job.yaml").read_text())
    kubectl.answer("get", says=json.dumps({"status": {"conditions": [{"type": "Failed", "status": "True"}]}}))
    api.resume(folder, ["launcher.nodes=2"])
    second = yaml.safe_load((folder / "job.yaml").read_text())
    assert [call[0] for call in kubectl.calls] == ["create", "get", "delete", "create"]
    assert second["spec"]["trainer"]["numNodes"] == 2
    assert worker(expanded(second, node=0)[0]) == worker(expanded(first, node=0)[0])


def test_what_began_elsewhere_is_not_begun_anew_here_nor_the_other_way(
    kubectl: Tool, tmp_path: Path, tiny_model: Path, mixed_data: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    api.train([*THERE, *JOB, f"run.dir={there}"])
    sent = list(kubectl.calls)
    with pytest.raises(UserError, match=r"is of launcher=kubernetes"):
        api.prepare(api.resumed(there, ["launcher=local"]))
    known = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "sharding=single", "launcher.procs=1"]
    api.prepare(api.compose([*known, f"run.dir={here}"]))
    with pytest.raises(UserError, match=r"is of launcher=local"):
        api.resume(here, JOB)
    assert kubectl.calls == sent


def test_settings_that_contradict_each_other_are_told_before_anything_is_sent(kubectl: Tool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="objective"):
        api.train([*THERE, *JOB, "objective=dop", f"run.dir={tmp_path / 'mine'}"])
    with pytest.raises(UserError, match="--config-dir"):
        api.train([*THERE, *JOB, f"run.dir={tmp_path / 'mine'}"], [str(tmp_path)])
    assert kubectl.calls == []


def test_a_dry_run_shows_the_job_and_asks_for_no_file(kubectl: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*THERE, *JOB, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "kind: TrainJob" in said
    assert "would run: kubectl create -f RUN/job.yaml" in said
    assert kubectl.calls == []
