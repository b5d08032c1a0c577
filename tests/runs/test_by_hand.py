"""Ranks that the user starts: `torchrun -m loomtune.train` composes once and runs as `loomtune train` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs.processes import PATIENCE, run
from runs.worlds import Worlds, free_port, maths

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def test_torchrun_makes_one_run_with_the_curve_of_the_launcher(tiny: list[str], worlds: Worlds, tmp_path: Path) -> None:
    settings, log = [*tiny, "objective=sft", "sharding=fsdp", "steps=4"], tmp_path / "log"
    group = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "mine"]
    script = ["-m", "loomtune.train", *settings]
    with log.open("wb") as file:
        command = [*TORCHRUN, *group, *script]
        done = subprocess.run(command, cwd=tmp_path, timeout=PATIENCE, check=False, stdout=file, stderr=file)
    assert done.returncode == 0, log.read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "mine", "named by the rendezvous, so that a restart meets it again"
    assert len(list(tmp_path.rglob("run.yaml"))) == 1
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert maths(folder) == worlds.train(2, settings, tmp_path / "launched").lines


def test_a_wrong_setting_ends_every_rank_with_one_message(tiny: list[str], tmp_path: Path) -> None:
    port, ranks = str(free_port()), []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "loomtune.train", *tiny, "optimizer.learning_rate=1", f"run.dir={tmp_path}/run"],
                env=os.environ | place | {"MASTER_PORT": port},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert sum(text.count("there is no setting 'optimizer.learning_rate'") for text in said) == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_process_needs_no_torchrun(tiny: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loomtune.train", *tiny, "steps=1", f"run.dir={tmp_path}/run"]
    assert run(command, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert [line["step"] for line in maths(tmp_path / "run")] == [1]
