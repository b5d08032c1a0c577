"""`loomtune doctor` as it is typed: exit codes, the file it leaves, how it ends whatever hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from loomtune.contracts import JobSpec, JobStatus, Launcher, Submission
from loomtune.errors import Preempted, UserError
from loomtune_plugins.commands.doctor import command, report
from loomtune_plugins.commands.doctor.waiting import Deadline, awaited, bounded

TORCHLESS = "import sys; from loomtune.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"


def doctor(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which must not import torch."""
    return subprocess.run(
        [sys.executable, "-c", TORCHLESS, "doctor", "--quick", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_local_processes_are_examined_without_torch_in_the_launching_one(tmp_path: Path) -> None:
    done = doctor("launcher.procs=2", "--json", f"run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (folder,) = tmp_path.glob("doctor-*")
    assert said == json.loads((folder / report.FILE).read_text())
    assert said["sound"]
    assert [of["ranks"] for of in said["nodes"].values()] == [[0, 1]]
    assert {(line["backend"], line["kind"]) for line in said["collectives"]} == {
        ("gloo", "all-reduce"),
        ("gloo", "all-gather"),
    }
    assert all(line["bus_bandwidth"] > 0 for line in said["collectives"])
    assert all(of["unseen"] == [] for of in said["said"]["seeing"].values())
    assert not (folder / "seen").exists()
    assert said["said"]["facts"]["0"]["versions"]["plugin loomtune_launchers"].startswith("loomtune ")


def test_one_process_with_a_fault_gives_exit_code_1_and_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor("launcher.procs=1", "--out", str(tmp_path / "out"), LOOMTUNE_CACHE=str(tmp_path / "file"))
    assert done.returncode == 1, done.stderr
    assert f"fault: the cache {tmp_path}/file cannot be written to on" in done.stdout
    assert "cure: mount it there" in done.stdout
    assert json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]["faults"] == 1


def test_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    with pytest.raises(UserError, match="no folder for an examination"):
        command.doctor(["--out", str(tmp_path)])


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf"])
@pytest.mark.parametrize("option", ["--timeout", "--wait"])
def test_what_is_no_time_is_refused(option: str, seconds: str) -> None:
    with pytest.raises(UserError, match=f"{option} .* is no time"):
        command.doctor([f"{option}={seconds}"])


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        command.doctor(["--out", str(tmp_path / "file" / "out")])


def test_a_rank_that_is_asked_to_end_says_what_it_knows_and_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", command.MODULE, str(tmp_path), "launched", "quiet", "seconds=60"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with subprocess.Popen(words, env=alone | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True) as rank:
        assert rank.stderr is not None
        while "disks" not in rank.stderr.readline():
            assert rank.poll() is None
        rank.send_signal(signal.SIGUSR1)
        assert rank.wait(30) == Preempted.exit_code
    said = json.loads((tmp_path / report.FILE).read_text())
    assert said["said"]["facts"] and not said["sound"]
    assert "asked to end (SIGUSR1)" in said["findings"][0]["what"]
    assert [path.name for path in tmp_path.iterdir()] == [report.FILE], "the result is for the agent to write"


class Engine(Launcher):
    """Does what the test says. states: what `status` answers, the last for ever. elastic: who sees `spec.nodes`."""

    detached = True

    def __init__(self, *states: str, elastic: bool = False) -> None:
        self.states, self.elastic, self.cancelled = list(states), elastic, False

    def processes(self, many: bool) -> int:
        return 6

    def spec(self, run: Path, processes: int, typed: Sequence[str] = ()) -> JobSpec:
        return JobSpec(run=run, arguments=(str(run),), nodes=(3, 3), procs=2, restarts=2, requeues=3)

    def render(self, spec: JobSpec) -> Submission:
        return Submission(commands=(("start", str(spec.nodes[0]) if self.elastic else ""),))

    def submit(self, spec: JobSpec) -> str:
        while not self.cancelled:
            time.sleep(0.01)
        return ""

    def status(self, run: Path) -> JobStatus:
        return JobStatus(self.states.pop(0) if len(self.states) > 1 else self.states[0], "as told")

    def logs(self, run: Path, *, follow: bool = False) -> Iterator[str]:
        return iter(())

    def cancel(self, run: Path) -> None:
        self.cancelled = True


def options(*words: str) -> object:
    return command._options(words)


def test_ranks_examine_in_the_job_of_a_run_which_is_never_started_again(tmp_path: Path) -> None:
    spec = command._examination(Engine("running"), Engine("").spec(tmp_path, 6), options("--quick", "--timeout", "100"))
    assert spec.module == command.MODULE
    assert spec.arguments == (str(tmp_path), "launched", "seconds=70", "nodes=3", "procs=2", "quick", "quiet")
    assert (spec.restarts, spec.requeues) == (0, 0)


def test_torchrun_begins_without_nodes_that_do_not_come_unless_an_engine_would_give_fewer(tmp_path: Path) -> None:
    plain, scheduler = Engine("running"), Engine("running", elastic=True)
    found = [command._examination(one, one.spec(tmp_path, 6), options()) for one in (plain, scheduler)]
    assert [spec.nodes for spec in found] == [(1, 3), (3, 3)]
    assert ["PET_RDZV_CONF" in spec.environment for spec in found] == [True, False]


def test_a_job_in_a_queue_has_a_time_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loomtune_plugins.commands.doctor.waiting.PAUSE", 0.01)
    engine = Engine(*["pending"] * 20, "running", "completed")
    assert awaited(engine, tmp_path, Deadline(timeout=60, wait=60), lambda: False) == []
    assert not engine.cancelled
    (late,) = awaited(Engine("pending"), tmp_path, Deadline(timeout=60, wait=0.05), lambda: False)
    assert "did not start within 0 s: as told" in late.what


def test_a_job_that_hangs_is_ended_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loomtune_plugins.commands.doctor.waiting.PAUSE", 0.01)
    engine = Engine("running")
    (late,) = awaited(engine, tmp_path, Deadline(timeout=0.05, wait=60), lambda: False)
    assert engine.cancelled
    assert "was not over within 0 s" in late.what


def test_a_launcher_that_waits_itself_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loomtune_plugins.commands.doctor.waiting.PAUSE", 0.01)
    engine, late = Engine("running"), []
    with bounded(engine, tmp_path, Deadline(timeout=0.05, wait=60), late, lambda: 1):
        engine.submit(engine.spec(tmp_path, 6))
    assert len(late) == 1


def test_ctrl_c_takes_the_job_out_of_its_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loomtune_plugins.commands.doctor.waiting.time.sleep", interrupted)
    engine = Engine("pending")
    with pytest.raises(KeyboardInterrupt):
        awaited(engine, tmp_path, Deadline(timeout=60, wait=60), lambda: False)
    assert engine.cancelled


def test_a_full_disk_is_a_fault_and_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(spec: JobSpec) -> str:
        raise OSError(28, "No space left on device")

    engine = Engine("running")
    monkeypatch.setattr(engine, "submit", full)
    (found,) = command._carried_out(engine, engine.spec(tmp_path, 6), options())
    assert "No space left on device" in found.what and "make room" in found.cure


def test_why_an_examination_broke_off_is_told_before_what_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    followed = {"level": "fault", "what": "it was asked to end", "cure": "look"}
    (tmp_path / report.FILE).write_text(json.dumps({"nodes": {}, "size": 2, "findings": [followed]}))
    (tmp_path / "result.json").write_text('{"error": "rank 1 on b: ended by signal 9 (SIGKILL)"}')
    (tmp_path / "seen").mkdir()
    assert command._concluded(tmp_path, [], json_wanted=False) == 1
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "fault: the examination broke off: rank 1 on b: ended by signal 9 (SIGKILL)"
    assert not (tmp_path / "seen").exists()


def test_where_a_job_was_asked_to_end_none_is_not_told_as_its_error(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"error": null}')

    assert "None" not in "".join(finding.what for finding in command._nobody(tmp_path, explained=False))


def test_where_nobody_answers_that_is_a_fault_with_what_the_job_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PAUSE", 0.0)
    (tmp_path / "result.json").write_text('{"error": "rank 3 on b: no such module"}')
    assert command._concluded(tmp_path, [], json_wanted=False) == 1
    assert "no rank gave an answer" in (said := capsys.readouterr().out)
    assert "rank 3 on b: no such module" in said
