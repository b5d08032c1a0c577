"""Attempts at one run: the newer supersedes the older, ranks die with their parent, and the world may change."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loomtune import checkpoint, cli
from loomtune.lease import Lease
from loomtune_plugins.trackers import metrics
from runs.curves import agree
from runs.processes import COMMAND, PATIENCE, run, started, tree, wait_for_step
from runs.worlds import Outcome, Worlds

Train = Callable[..., Outcome]


def result(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "result.json").read_text())
    return found


def test_ranks_die_with_their_launcher_and_the_run_goes_on_with_other_numbers_of_them(
    tiny: list[str], train: Train, worlds: Worlds, tmp_path: Path
) -> None:
    """From 2 processes, whose launcher is killed, to 1 by the command, to 4."""
    settings, folder, log = [*tiny, "steps=24", "checkpoint.every=4"], tmp_path / "run", tmp_path / "log"
    slow = [*settings, "sharding=ddp", "launcher.procs=2", f"run.dir={folder}"]
    with started([*COMMAND, "train", *slow], log) as process:
        wait_for_step(folder, 5, process)
        ranks = [member for member in tree(process) if member.pid != process.pid]
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=PATIENCE / 2)
    assert not alive, "killing the launcher alone must leave no rank writing"
    committed = checkpoint.latest(folder / "checkpoints")
    assert committed is not None and checkpoint.step_of(committed) >= 4
    written = metrics.read(folder)[-1]["step"]

    once = [*COMMAND, "resume", str(folder), "sharding=single", "launcher.procs=1", "stop_after=22"]
    assert run(once, log) == 0, log.read_text()
    assert result(folder)["step"] == 22 and written <= 22
    moved = worlds.resume(4, folder, "sharding=fsdp")
    assert [line["step"] for line in moved.lines] == [*range(1, 25)], "lines after the committed step were cut"
    agree(moved, train(1, settings, "sharding=single", folder="still"))


def test_an_attempt_that_was_thought_dead_ends_without_a_result_and_commits_nothing(
    tiny: list[str], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = [*tiny, "steps=100000", "checkpoint.every=50", "sharding=single", "launcher.procs=1"]
    with started([*COMMAND, "train", *settings, f"run.dir={folder}"], log) as process:
        wait_for_step(folder, 2, process)
        newer = Lease.take(folder)
        before = checkpoint.latest(folder / "checkpoints")
        assert process.wait(PATIENCE) == 1
    assert f"attempt {newer.attempt}" in log.read_text()
    assert not (folder / "result.json").exists(), "the result is the newer attempt's to write"
    assert checkpoint.latest(folder / "checkpoints") == before
    newer.check()


def test_lines_beyond_the_committed_step_are_cut_and_written_anew(
    tiny: list[str], train: Train, worlds: Worlds, tmp_path: Path
) -> None:
    settings = [*tiny, "sharding=fsdp", "steps=8"]
    done = train(2, settings, "checkpoint.every=3", "checkpoint.keep=5", folder="done")
    folder = shutil.copytree(done.folder, tmp_path / "crashed")
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss"')
    again = worlds.resume(2, folder)
    assert again.lines == done.lines


@pytest.mark.parametrize(("procs", "nearest"), [(3, "sharding.replicate=1"), (5, "sharding.replicate=1")])
def test_a_world_that_the_mesh_cannot_divide_is_refused_with_the_nearest(
    procs: int, nearest: str, tiny: list[str], train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    half = train(4, tiny, "sharding=fsdp", "sharding.replicate=2", "steps=4", "stop_after=2", folder=f"half{procs}")
    before = (half.folder / "run.yaml").read_bytes()
    with pytest.raises(SystemExit) as ended:
        cli.main(["resume", str(half.folder), f"launcher.procs={procs}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{procs} processes cannot be divided" in said and nearest in said
    assert (half.folder / "run.yaml").read_bytes() == before, "nothing of the run was touched"
