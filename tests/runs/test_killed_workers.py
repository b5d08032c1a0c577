"""Workers that the kernel ends, again and again: the run finishes, and learns what it would have learned."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from loomtune import checkpoint
from loomtune_launchers.watching import ranklogs
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


def kill_one(folder: Path, process: Popen[bytes], rank: int, steps: int, restarted: int) -> tuple[int, int]:
    """Kills a rank as soon as its group has made so many steps; gives the last that was written, and committed."""
    until = time.monotonic() + PATIENCE / 2
    before = last(folder)
    while len(ranklogs.attempts(folder)) <= restarted or last(folder) < before + steps:
        assert time.monotonic() < until, f"no step came after kill {restarted}"
        assert process.poll() is None, "the run ended too early"
        before = min(before, last(folder))  # lines after the committed step are cut when the run goes on
        time.sleep(0.005)
    committed = checkpoint.latest(folder / "checkpoints")
    os.kill(workers(process.pid)[rank].pid, signal.SIGKILL)
    return last(folder), checkpoint.step_of(committed) if committed else 0


def began_after(attempt: Path) -> int:
    """The step that an attempt of a run goes on from, by what its first rank says."""
    said = (attempt / "0" / ranklogs.FILE).read_text()
    found = re.search(r"goes on after step (\d+)", said)
    return int(found[1]) if found else 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 10])
def test_a_run_whose_workers_are_killed_again_and_again_finishes_with_the_losses_of_one_that_was_left_alone(
    kills: int, tiny: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    talking = [text.replace("tracker=[jsonl]", "tracker=[jsonl,console]") for text in tiny]
    settings = [*talking, "steps=36", f"checkpoint.every={EVERY}", "sharding=ddp", "launcher.procs=2"]
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert run([*COMMAND, "train", *settings, f"run.dir={alone}"], log) == 0, log.read_text()
    chance = random.Random(0)
    killed = []
    command = [*COMMAND, "train", *settings, f"launcher.restarts={kills}", f"run.dir={folder}"]
    with started(command, log) as process:
        for kill in range(kills):
            killed.append(kill_one(folder, process, chance.randrange(2), chance.randrange(1, 4), kill))
        assert process.wait(PATIENCE) == 0, log.read_text()
    said = log.read_text()
    attempts = ranklogs.attempts(folder)
    went_on = [began_after(attempt) for attempt in attempts[1:]]
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert len(attempts) == kills + 1
    assert said.count("ended by signal 9") == kills and f"again, {kills} of {kills}" in said
    kept, calm = metrics.read(folder), metrics.read(alone)
    assert [line["step"] for line in kept] == [line["step"] for line in calm] == list(range(1, 37))
    assert largest([line["loss"] for line in kept], [line["loss"] for line in calm]) < 2e-6
    told = f"killed after (written, committed) {killed}, went on after {went_on}"
    for (written, committed), after in zip(killed, went_on, strict=True):
        assert after >= committed, f"what was committed is not repeated: {told}"
        assert written - after <= EVERY + 1, f"a checkpoint is committed while the next step runs: {told}"
    print(told)
