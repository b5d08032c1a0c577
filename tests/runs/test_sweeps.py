"""Sweeps over real runs: one with a planted failure, one that is killed and goes on, and one that Optuna asks for."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from loomtune.compose import quoted
from loomtune.plan import Plan
from loomtune_plugins.lines import read
from runs.processes import COMMAND, PATIENCE, run, started, tree
from support import mixed_rows, write_rows

SWEEP = [*COMMAND, "train", "-m"]


def compared(folder: Path) -> dict[str, dict[str, Any]]:
    """Items by what was varied."""
    found = json.loads((folder / "comparison.json").read_text())["runs"]
    return {" ".join(f"{key}={value}" for key, value in one["settings"].items()): one for one in found}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(line["step"], line["loss"]) for line in read(Path(one["run"]))]
        for name, one in compared(folder).items()
    }


def wait(until: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < PATIENCE, "it did not come to pass"
        time.sleep(0.05)


def halted(command: Sequence[str], folder: Path, log: Path, number: signal.Signals) -> int:
    """Sends a signal to a sweep when its second item has made a step; gives its exit code when all of it is gone."""
    with started(command, log) as process:
        wait(lambda: process.poll() is not None or sum(bool(read(one)) for one in folder.glob("*/")) >= 2)
        assert process.poll() is None, log.read_text()
        members = tree(process)
        process.send_signal(number)
        process.wait(PATIENCE)
        _, alive = psutil.wait_procs(members, timeout=120)
        assert not alive, alive
    return process.returncode


def test_a_sweep_of_real_runs_tells_what_each_came_to(tiny: list[str], tmp_path: Path) -> None:
    log, folder, name = tmp_path / "log", tmp_path / "sweep", 'it\'s "so"; $(x), {y: [1,\n2]}'
    kept = [word for word in tiny if not word.startswith("optimizer.lr=")]
    typed = [*kept, "sharding=single", "steps=2", "objective=sft", "optimizer.lr=1e-3,fast", f"run.name={quoted(name)}"]
    assert run([*SWEEP, *typed, f"hydra.sweep.dir={folder}"], log) == 1
    found = compared(folder)
    assert found["optimizer.lr=0.001"]["status"] == "completed" and found["optimizer.lr=0.001"]["steps"] == 2
    assert Plan.load(Path(found["optimizer.lr=0.001"]["run"])).root.run.name == name
    assert found["optimizer.lr=fast"]["status"] == "failed"
    assert "could not be converted to Float" in log.read_text()


@pytest.mark.slow
def test_two_objectives_and_three_adapters_with_a_planted_failure_killed_and_resumed(
    tiny: list[str], tmp_path: Path
) -> None:
    """The failure is planted in a folder, where no check before the start looks for it."""
    rows = [{**row, "text": row["completion"] * 3} for row in mixed_rows(40)]
    kept = [word for word in tiny if not word.startswith("data.path=")]
    data = [f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}", "data.text=text"]
    varied = ["objective=sft,pretrain", "adapter=full,lora,ia3", "hydra.launcher.jobs=2"]
    words = [*kept, *data, "sharding=single", "steps=8", "checkpoint.every=2", *varied]
    whole, halved, log = tmp_path / "whole", tmp_path / "halved", tmp_path / "log"
    for folder in (whole, halved):
        planted(folder, words)
    assert run([*SWEEP, *words, f"hydra.sweep.dir={whole}"], log) == 1, log.read_text()
    command = [*SWEEP, *words, f"hydra.sweep.dir={halved}"]
    assert halted(command, halved, log, signal.SIGKILL) == -signal.SIGKILL
    assert run(command, log) == 1
    found = {name: one["status"] for name, one in compared(halved).items()}
    assert list(found.values()).count("completed") == 5
    assert found["objective=pretrain adapter=lora"] == "failed"
    assert curves(halved) == curves(whole)
    for name in ("comparison.md", "comparison.html", "best.yaml"):
        assert (halved / name).is_file()


def planted(folder: Path, words: Sequence[str]) -> None:
    """A file where one item's checkpoints would be, so that its first commit fails."""
    from loomtune_plugins.commands.sweeps.goal import Goal
    from loomtune_plugins.commands.sweeps.items import Item
    from loomtune_plugins.commands.sweeps.request import Request, parsed

    asked = Request.read(words).words
    doomed = {"objective": "pretrain", "adapter": "lora"}
    overrides = [
        f"{entry.get_key_element()}={doomed.get(entry.key_or_group) or entry.get_value_element_as_str()}"
        for entry in parsed(asked)
    ]
    item = Item(folder, tuple(overrides), Goal())
    item.folder.mkdir(parents=True)
    (item.folder / "checkpoints").write_text("no folder")


@pytest.mark.slow
def test_optuna_searches_for_the_learning_rate_and_goes_on_after_a_kill(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    kept = [word for word in tiny if not word.startswith("optimizer.lr=")]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "optimizer.lr=tag(log,interval(1e-5,1e-1))"]
    words = [*kept, "sharding=single", "objective=sft", "steps=12", "checkpoint.every=3", *search]
    whole, halved, log = tmp_path / "whole", tmp_path / "halved", tmp_path / "log"
    assert run([*SWEEP, *words, f"hydra.sweep.dir={whole}"], log) == 0, log.read_text()
    command = [*SWEEP, *words, f"hydra.sweep.dir={halved}"]
    assert halted(command, halved, log, signal.SIGKILL) == -signal.SIGKILL
    assert run(command, log) == 0
    assert curves(halved) == curves(whole) and len(curves(whole)) == 5


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_leave_ends_politely_and_goes_on_by_its_folder(
    tiny: list[str], tmp_path: Path
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    words = [*tiny, "sharding=single", "objective=sft", "steps=40", "seed=0,1,2", "hydra.launcher.jobs=2"]
    assert halted([*SWEEP, *words, f"hydra.sweep.dir={folder}"], folder, log, signal.SIGTERM) == 75
    kept = [path.parent.parent for path in folder.glob("*/checkpoints/LATEST")]
    assert len(kept) == 2, "each saved what it had"
    assert run([*COMMAND, "resume", str(folder)], log) == 0, log.read_text()
    assert {one["status"] for one in compared(folder).values()} == {"completed"}
    assert all([step for step, _ in curve] == list(range(1, 41)) for curve in curves(folder).values())


@pytest.mark.slow
def test_a_bad_trial_is_pruned_and_its_checkpoint_stays(tiny: list[str], tmp_path: Path) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    kept = [word for word in tiny if not word.startswith("optimizer.lr=")]
    rates = ["optimizer.lr=1e-3,2e-3,3e-3,1e-9", "hydra.launcher.prune_after=4"]
    words = [*kept, "sharding=single", "objective=sft", "steps=400", "stop_after=200", *rates]
    assert run([*SWEEP, *words, f"hydra.sweep.dir={folder}"], log) == 0, log.read_text()
    bad = compared(folder)["optimizer.lr=1e-09"]
    assert bad["status"] == "pruned" and 4 <= bad["steps"] < 200 and bad["value"] is not None
    assert (Path(bad["run"]) / "checkpoints" / "LATEST").is_file()
    assert [one["status"] for one in compared(folder).values()].count("stopped") == 3
