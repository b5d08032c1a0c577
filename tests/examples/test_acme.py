"""The example of a third party's package, installed into a folder of its own and used for real."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = ROOT / "examples" / "loomtune-acme"


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that it is installed in."""
    folder = tmp_path_factory.mktemp("acme")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--no-index", "--target", folder, PACKAGE], check=True)
    return folder


def run(acme: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(acme)} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_plugins_lists_it_with_distribution_and_version(acme: Path) -> None:
    offers = json.loads(run(acme, "loomtune.cli", "plugins", "acme", "--json").stdout)["offers"]
    brought = {(offer["axis"], offer["name"], offer["distribution"], offer["version"]) for offer in offers}
    assert brought == {("objective", "focal", "loomtune-acme", "0.1.0"), ("tracker", "csv", "loomtune-acme", "0.1.0")}
    assert "focal" in run(acme, "loomtune.cli", "plugins").stdout


@pytest.mark.parametrize("hidden", [{"LOOMTUNE_DISABLE_PLUGINS": "1"}, {"LOOMTUNE_PLUGINS": "another"}])
def test_the_environment_hides_it(acme: Path, hidden: dict[str, str]) -> None:
    listed = run(acme, "loomtune.cli", "plugins", **hidden)
    assert listed.returncode == 0
    assert "focal" not in listed.stdout and "sft" in listed.stdout
    refused = run(acme, "loomtune.cli", "train", "objective=focal", **hidden)
    assert refused.returncode == 2
    assert "no objective is called 'focal'" in refused.stderr


def test_its_settings_are_strict_and_its_preflight_is_heard(acme: Path, tiny_model: Path, mixed_data: Path) -> None:
    data = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "recipe=acme_focal"]
    typo = run(acme, "loomtune.cli", "train", *data, "objective.gama=1")
    assert typo.returncode == 2
    assert "Did you mean 'objective.gamma'?" in typo.stderr
    doubted = run(acme, "loomtune.cli", "train", "--dry-run", *data, "objective.gamma=0")
    assert doubted.returncode == 0
    assert "warning: objective.gamma=0 is plain fine-tuning" in doubted.stderr
    assert "optimizer.lr=0.0001  # recipe=acme_focal" in doubted.stdout
    assert "tracker.csv.name=csv  # recipe=acme_focal" in doubted.stdout


def test_it_trains_on_two_processes(acme: Path, tiny_model: Path, mixed_data: Path, tmp_path: Path) -> None:
    settings = ["objective=focal", "tracker=[jsonl,csv]", "sharding=ddp", "launcher.procs=2", "steps=3", "batch.size=4"]
    data = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", f"run.dir={tmp_path / 'run'}"]
    ran = run(acme, "loomtune.cli", "train", *settings, *data)
    assert ran.returncode == 0, ran.stderr
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines]
    assert len(rows) == 3 and all(0 <= line["known"] <= 1 for line in lines)
    assert (tmp_path / "run" / "acme.txt").read_text() == "completed at step 3 of 3\n"
    versions = json.loads((tmp_path / "run" / "plugins.json").read_text())
    assert versions["acme"] == "loomtune-acme 0.1.0"


def test_its_own_tests_pass(acme: Path) -> None:
    ran = run(acme, "pytest", "-q", "-p", "no:cacheprovider", PACKAGE / "tests")
    assert ran.returncode == 0, ran.stdout
