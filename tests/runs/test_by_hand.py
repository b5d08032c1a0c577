"""Ranks that the user starts: `torchrun -m loomtune.train` composes once and runs as `loomtune train` does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loomtune import api, checkpoint
from loomtune.signals import TOGETHER
from runs.curves import agree
from runs.processes import PATIENCE, run, started, wait_for_step
from runs.worlds import Failed, Outcome, Worlds, free_port, maths

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def test_torchrun_makes_one_run_with_the_curve_of_the_launcher(tiny: list[str], worlds: Worlds, tmp_path: Path) -> None:
    settings, log = [*tiny, "objective=sft", "sharding=fsdp", "steps=4"], tmp_path / "log"
    group = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "mine", "--max-restarts", "1"]
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
    assert log.read_text().count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 1, "restarts are asked for, and would fail"


def two_ranks(*words: str, errors: Path) -> tuple[list[int], list[str]]:
    """Exit codes and words of two ranks that no torchrun started. errors: where they leave theirs."""
    port, ranks = str(free_port()), []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": port, "TORCHELASTIC_ERROR_FILE": str(errors / f"{rank}.json")}
        command = [sys.executable, "-m", "loomtune.train", *words]
        ranks.append(subprocess.Popen(command, env=os.environ | place, stderr=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], said


def test_a_wrong_setting_ends_every_rank_with_one_message(tiny: list[str], tmp_path: Path) -> None:
    codes, said = two_ranks(*tiny, "optimizer.learning_rate=1", f"run.dir={tmp_path}/run", errors=tmp_path)
    wrong = "there is no setting 'optimizer.learning_rate'"
    assert codes == [2, 2], said
    assert sum(text.count(wrong) for text in said) == 1, said
    assert not (tmp_path / "run").exists()
    for rank in range(2):  # on every node torchrun tells it
        assert wrong in json.loads((tmp_path / f"{rank}.json").read_text())["message"]["message"]


@pytest.mark.slow
def test_ranks_whose_first_one_serves_the_store_itself_make_a_run(tiny: list[str], tmp_path: Path) -> None:
    """As a scheduler starts them, or torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."""
    codes, said = two_ranks(*tiny, "sharding=ddp", "steps=2", f"run.dir={tmp_path}/run", errors=tmp_path)
    assert codes == [0, 0], said
    assert [line["step"] for line in maths(tmp_path / "run")] == [1, 2]


def test_a_world_of_another_size_than_the_plan_s_goes_on_or_is_refused_with_the_nearest(
    tiny: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    """As where nodes come and go, or torchrun is given other numbers for a prepared folder."""

    def prepared(folder: str, *more: str) -> Path:
        settings = [*tiny, "sharding=fsdp", "steps=2", *more, f"run.dir={tmp_path / folder}"]
        return api.prepare(api.compose(settings, processes=4))

    assert len(worlds.of(2).run(prepared("fits")).lines) == 2
    with pytest.raises(Failed) as refused:
        worlds.of(2).run(prepared("not", "sharding.replicate=4"))
    assert {kind for kind, _ in refused.value.errors} == {"UserError"} and len(refused.value.errors) == 2
    assert all("2" in said and "sharding.replicate" in said for _, said in refused.value.errors)


@pytest.mark.slow
def test_a_stop_file_leaves_politely_and_a_second_signal_at_once_and_nothing_committed_is_lost(
    tiny: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    """Steps that last seconds, so that the second signal comes within one."""
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = [*tiny, "batch.size=12000", "steps=4", "checkpoint.every=1", "sharding=single"]
    command = [sys.executable, "-m", "loomtune.train", *settings, f"run.dir={folder}"]
    with started(command, log) as process:
        wait_for_step(folder, 1, process)
        (folder / "stop").touch()
        assert process.wait(PATIENCE) == 75, log.read_text()
    assert json.loads((folder / "result.json").read_text())["status"] == "preempted"
    assert not (folder / "stop").exists(), "heard"
    done = maths(folder)[-1]["step"]
    with started(command, log) as process:
        wait_for_step(folder, done + 1, process)
        while step_of(folder) == done:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(TOGETHER + 0.5)
        assert process.poll() is None, "it is still within its step"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 1, log.read_text()
    assert not (folder / "result.json").exists(), "there was no time for one"
    assert step_of(folder) == done + 1
    assert run(command, log) == 0, log.read_text()
    agree(Outcome(folder, {}), worlds.train(1, settings, tmp_path / "still"))


def step_of(folder: Path) -> int:
    """The last step that was committed."""
    path = checkpoint.latest(folder / "checkpoints")
    return checkpoint.step_of(path) if path else 0


@pytest.mark.slow
def test_one_process_needs_no_torchrun(tiny: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loomtune.train", *tiny, "steps=1", f"run.dir={tmp_path}/run"]
    assert run(command, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert [line["step"] for line in maths(tmp_path / "run")] == [1]
