"""Workers that the kernel ends, again and again: the run finishes, and learns what it would have learned."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from loomtune_launchers import ranklogs
from loomtune_plugins.trackers import metrics
from runs.curves import largest
from runs.processes import COMMAND, PATIENCE, run, started

EVERY = 2


def workers(root: int) -> list[psutil.Process]:
    """The ranks below a launcher, by their numbers."""
    found = []
    for process in sorted(psutil.Process(root).children(recursive=True), key=lambda process: process.pid):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "loomtune.worker" in line and "loomtune_launchers.agent" not in line:
            found.append(process)
    return found


def last(folder: Path) -> int:
    return max((line["step"] for line in metrics.read(folder)), default=0)


def kill_one(folder: Path, process: Popen[bytes], rank: int, steps: int, restarted: int) -> int:
    """Kills a rank as soon as its group has made so many steps; gives the last step that had been written."""
    until = time.monotonic() + PATIENCE / 2
    before = last(folder)
    while len(ranklogs.attempts(folder)) <= restarted or last(folder) < before + steps:
        assert time.monotonic() < until, f"no step came after kill {restarted}"
        assert process.poll() is None, "the run ended too early"
        before = min(before, last(folder))  # lines after the committed step are cut when the run goes on
        time.sleep(0.005)
    os.kill(workers(process.pid)[rank].pid, signal.SIGKILL)
    return last(folder)


@pytest.mark.slow
def test_a_run_whose_workers_are_killed_ten_times_finishes_with_the_losses_of_one_that_was_left_alone(
    tiny: list[str], tmp_path: Path
) -> None:
    kills, log = 10, tmp_path / "log"
    told = [text.replace("tracker=[jsonl]", "tracker=[jsonl,console]") for text in tiny]
    settings = [*told, "steps=48", f"checkpoint.every={EVERY}", "sharding=ddp", "launcher.procs=2"]
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert run([*COMMAND, "train", *settings, f"run.dir={alone}"], log) == 0, log.read_text()
    chance = random.Random(0)
    written = []
    command = [*COMMAND, "train", *settings, f"launcher.restarts={kills}", f"run.dir={folder}"]
    with started(command, log) as process:
        for kill in range(kills):
            written.append(kill_one(folder, process, chance.randrange(2), chance.randrange(1, 4), kill))
        assert process.wait(PATIENCE) == 0, log.read_text()
    said = log.read_text()
    went_on = [int(line.split("goes on after step ")[1].split()[0]) for line in said.splitlines() if "goes on" in line]
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert len(ranklogs.attempts(folder)) == kills + 1
    assert said.count("SIGKILL") == kills and f"again, {kills} of {kills}" in said
    kept, calm = metrics.read(folder), metrics.read(alone)
    assert [line["step"] for line in kept] == [line["step"] for line in calm] == list(range(1, 49))
    assert largest([line["loss"] for line in kept], [line["loss"] for line in calm]) < 2e-6
    lost = [before - after for before, after in zip(written, went_on, strict=True)]
    assert max(lost) <= EVERY, f"killed after steps {written}, went on after {went_on}"
    print(f"killed after steps {written}, went on after {went_on}")
