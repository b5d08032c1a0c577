"""launcher=slurm: what is put to sbatch, what is refused before, and how a run stands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm_side import commands
from loomtune import api
from loomtune.contracts import JobSpec
from loomtune.errors import RunFailed, UserError
from loomtune_launchers import jobs, node
from loomtune_launchers.slurm import script as slurm_script
from loomtune_launchers.slurm.queue import Job
from loomtune_launchers.slurm.settings import SlurmSettings
from loomtune_launchers.slurm.slurm import Slurm
from loomtune_launchers.torchrun import Meeting

ODD = 'it\'s "quoted" $(id) `id`\nsecond line'


def spec(launcher: Slurm, run: Path = Path("/runs/one"), many: bool = True) -> JobSpec:
    return launcher.spec(run, launcher.processes(many))


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_the_command_says_all_that_was_set_as_elements_of_a_list() -> None:
    settings = SlurmSettings(
        nodes=4,
        gpus=8,
        cpus=12,
        memory="900G",
        time="1-12:00:00",
        partition="a b",
        account="me",
        qos="high",
        reservation="mine",
        constraint="a100&nvlink",
        grace=90,
        options=["--exclusive", "--mail-type=END"],
    )
    launcher = Slurm(settings)
    (command,) = launcher.render(spec(launcher)).commands
    assert command == (
        "sbatch", "--parsable", "--job-name=one", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=96",
        "--gres=gpu:8", "--mem=900G", "--time=2160", "--partition=a b", "--account=me", "--qos=high",
        "--reservation=mine", "--constraint=a100&nvlink", "--requeue", "--signal=B:USR1@90", "--open-mode=append",
        "--export=ALL", "--exclusive", "--mail-type=END", "--output=/runs/one/slurm-%j.out", "/runs/one/job.sh",
    )  # fmt: skip


def test_what_is_not_set_is_not_asked_for() -> None:
    launcher = Slurm(SlurmSettings(requeues=0))
    (command,) = launcher.render(spec(launcher)).commands
    assert command[:5] == ("sbatch", "--parsable", "--job-name=one", "--nodes=1", "--ntasks-per-node=1")
    assert command[5:-2] == ("--no-requeue", "--signal=B:USR1@60", "--open-mode=append", "--export=ALL")


def test_the_script_holds_the_setup_and_paths_of_ours_and_no_value(tmp_path: Path) -> None:
    settings = SlurmSettings(environment={"A": ODD}, setup=["module load cuda", "ulimit -l unlimited"])
    launcher, run = Slurm(settings), tmp_path / "it's here"
    files = launcher.render(spec(launcher, run)).files
    quoted = "'" + str(run).replace("'", "'\"'\"'") + "'"
    assert files["job.sh"].splitlines() == [
        "#!/bin/bash",
        "module load cuda",
        "ulimit -l unlimited",
        f"exec {sys.executable} -m loomtune_launchers.slurm.job {quoted}",
    ]
    assert jobs.read(files["job.json"]).environment["A"] == ODD
    assert not list(tmp_path.iterdir()), "rendering writes nothing"


def test_one_task_a_node_starts_the_node_from_the_job_file() -> None:
    launcher = Slurm(SlurmSettings(python="/opt/python"))
    command = json.loads(launcher.render(spec(launcher)).files["slurm.json"])
    assert command[:2] == ["srun", "--ntasks-per-node=1"]
    assert command[-4:] == ["/opt/python", "-m", "loomtune_launchers.node", "/runs/one/job.json"]
    assert "--kill-on-bad-exit=0" in command, "a node that has left must not end rank 0 while it writes"


@pytest.mark.parametrize(
    ("container", "gpus", "between"),
    [
        ("pyxis", 0, ["--container-image=an image", "--container-mounts={}", "--container-workdir={here}"]),
        ("apptainer", 0, ["apptainer", "exec", "--bind={}", "--pwd={here}", "an image"]),
        ("apptainer", 2, ["apptainer", "exec", "--nv", "--bind={}", "--pwd={here}", "an image"]),
    ],
)
def test_a_container_sees_the_run_the_working_folder_and_the_mounts(
    container: str, gpus: int, between: list[str]
) -> None:
    settings = SlurmSettings(container=container, image="an image", mounts=["/data:/data:ro"], gpus=gpus)
    launcher, here = Slurm(settings), str(Path.cwd())
    command = json.loads(launcher.render(spec(launcher)).files["slurm.json"])
    mounts = f"/runs/one:/runs/one,{here}:{here},/data:/data:ro"
    begin = command.index("--export=ALL") + 1
    assert command[begin:-4] == [word.format(mounts, here=here) for word in between]
    assert command[-4] == "python3", "this machine's Python is not in the image"


@pytest.mark.parametrize(
    ("settings", "many", "nodes", "procs"),
    [
        ({"nodes": 2}, True, (2, 2), 1),
        ({"nodes": 2, "gpus": 8}, True, (2, 2), 8),
        ({"nodes": 1, "gpus": 8}, False, (1, 1), 1),
        ({"nodes": 2, "gpus": 8, "procs": 4}, True, (2, 2), 4),
        ({"nodes": "1:4", "gpus": 2}, True, (1, 4), 2),
    ],
)
def test_processes_follow_from_nodes_and_gpus(
    settings: dict[str, Any], many: bool, nodes: tuple[int, int], procs: int
) -> None:
    launcher = Slurm(SlurmSettings(**settings))
    made = spec(launcher, many=many)
    assert (made.nodes, made.procs, launcher.processes(many)) == (nodes, procs, nodes[1] * procs)
    least, most = nodes
    (command,) = launcher.render(made).commands
    assert (f"--nodes={least}" if least == most else f"--nodes={least}-{most}") in command
    assert ("--ntasks-per-node=1" in command) is (least == most), "or Slurm gives the least"


def test_threads_are_the_cores_of_a_process_unless_they_are_set() -> None:
    assert spec(Slurm(SlurmSettings(cpus=6, procs=4))).environment["OMP_NUM_THREADS"] == "6"
    assert spec(Slurm(SlurmSettings(cpus=6, procs=4, threads=2))).environment["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in spec(Slurm(SlurmSettings())).environment


@pytest.mark.parametrize(
    ("time", "seconds"),
    [(0, 0), (90, 90), ("90", 90), ("90:30", 5430), ("1:00:00", 3600), ("2-0", 172800), ("1-2:3", 93780), ("", 0),
     ("1-02:03:04", 93784)],
)  # fmt: skip
def test_a_time_is_seconds_or_as_slurm_writes_it(time: int | str, seconds: int) -> None:
    assert slurm_script.seconds(time) == seconds


@pytest.mark.parametrize(
    ("settings", "said", "cure"),
    [
        ({"time": "tomorrow"}, "launcher.time=tomorrow is no time", "12:00:00"),
        ({"time": -1}, "is no time", "seconds"),
        ({"time": 100, "grace": 30}, "leaves no time to train", "launcher.time=150 at least"),
        ({"nodes": "4:2"}, "is no number of nodes", "launcher.nodes=2"),
        ({"procs": 0}, "launcher.procs=0", "launcher.procs=auto"),
        ({"gpus": -1}, "launcher.gpus=-1", "launcher.gpus=0"),
        ({"requeues": -1}, "launcher.requeues=-1", "launcher.requeues=0"),
        ({"partition": "a\n#SBATCH --account=b"}, "launcher.partition has a line break", "one line"),
        ({"memory": "1G\n"}, "launcher.memory has a line break", "one line"),
        ({"options": ["exclusive"]}, "'exclusive', which is no option", "--mail-type"),
        ({"options": ["--mail-user=a\nb"]}, "which is no option", "each as one text"),
        ({"options": ["--partition=x"]}, "this launcher says itself", "use launcher.partition"),
        ({"options": ["-p", "x"]}, "this launcher says itself", "use launcher.partition"),
        ({"options": ["--array=0-3"]}, "this launcher says itself", "leave it out"),
        ({"container": "docker", "image": "x"}, "launcher.container=docker is not known", "pyxis or apptainer"),
        ({"container": "pyxis"}, "needs an image", "launcher.image"),
        ({"image": "x"}, "there is none", "launcher.container=pyxis"),
        ({"container": "pyxis", "image": "x", "mounts": ["/a"]}, "launcher.mounts has '/a'", "from:to"),
        ({"container": "pyxis", "image": "x", "mounts": ["/a:/b,/c:/d"]}, "launcher.mounts has", "without a comma"),
    ],
)
def test_what_slurm_would_misread_is_refused_with_its_cure(settings: dict[str, Any], said: str, cure: str) -> None:
    with pytest.raises(UserError) as raised:
        Slurm(SlurmSettings(**settings))
    (fault,) = raised.value.faults
    assert said in fault.what and cure in fault.cure


def test_a_path_of_the_run_is_no_pattern_of_slurms() -> None:
    assert slurm_script.output(Path("/a%j b"), "x") == "--output=/a%%j b/x"
    with pytest.raises(UserError, match="a backslash"):
        slurm_script.output(Path("/a\\b"), "x")


def test_a_jobs_name_is_one_word() -> None:
    assert slurm_script.label("it's a\nrun") == "it_s_a_run"


def test_an_array_is_one_command_and_a_table_of_the_runs() -> None:
    launcher = Slurm(SlurmSettings())
    specs = [spec(launcher, Path(f"/sweep/{i}")) for i in range(3)]
    made = launcher.render_all(specs, at_once=2)
    table, script = sorted(made.files, reverse=False)
    assert json.loads(made.files[table]) == ["/sweep/0", "/sweep/1", "/sweep/2"]
    assert made.files[script].endswith(f"slurm.job --item-of /sweep/{table}\n")
    assert "--array=0-2%2" in made.commands[0] and "--output=/sweep/slurm-%A_%a.out" in made.commands[0]
    assert "--array=0-2" in launcher.render_all(specs, at_once=0).commands[0]


def test_runs_that_ask_for_different_things_are_no_array(tmp_path: Path) -> None:
    launcher = Slurm(SlurmSettings())
    one = spec(launcher, tmp_path / "one")
    assert launcher.submit_all([one, replace(one, run=tmp_path / "two", nodes=(2, 2))], 0) is None
    assert not list(tmp_path.iterdir())


def test_what_sbatch_says_is_the_error_and_the_run_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, sbatch="echo sbatch: error: invalid partition specified: x >&2; exit 1")
    launcher = Slurm(SlurmSettings(partition="x"))
    with pytest.raises(UserError, match="invalid partition specified: x"):
        launcher.submit(spec(launcher, tmp_path / "run"))
    with pytest.raises(UserError, match="was not started by launcher=slurm"):
        launcher.status(tmp_path / "run")


def test_without_slurm_the_cure_is_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = Slurm(SlurmSettings())
    with pytest.raises(UserError, match="login node"):
        launcher.submit(spec(launcher, tmp_path / "run"))


def test_a_submitted_run_has_its_files_and_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path, monkeypatch, sbatch=f'printf "%s\\0" "$@" > {tmp_path}/asked; echo "be welcome"; echo "12;far"')
    launcher, run = Slurm(SlurmSettings(environment={"A": ODD})), tmp_path / "run"
    run.mkdir()
    for name in ("cancelled", "stop"):
        (run / name).touch()
    assert launcher.detached and launcher.submit(spec(launcher, run)) == "12"
    asked = (tmp_path / "asked").read_text().split("\0")
    assert tuple(asked[:-1]) == launcher.render(spec(launcher, run)).commands[0][1:]
    assert jobs.read((run / "job.json").read_text()) == spec(launcher, run)
    assert json.loads((run / "launcher.json").read_text()) == {
        "launcher": "slurm", "job": "12", "cluster": "far", "output": f"{run}/slurm-12.out",
    }  # fmt: skip
    assert not (run / "cancelled").exists() and not (run / "stop").exists(), "a new start takes them away"


@pytest.mark.parametrize(
    ("queued", "result", "cancelled", "state"),
    [
        (("PENDING", "Resources"), None, False, "pending"),
        (("PENDING", "BeginTime"), "preempted", False, "pending"),
        (("RUNNING", "None"), None, False, "running"),
        (("RUNNING", "None"), "failed", False, "running"),
        (("RUNNING", "None"), "preempted", False, "running"),
        (("COMPLETING", "None"), "completed", False, "completed"),
        (("COMPLETING", "None"), None, True, "running"),
        (("COMPLETED", "None"), "completed", False, "completed"),
        (("COMPLETED", "None"), "completed", True, "completed"),
        (("FAILED", "NonZeroExitCode"), "failed", False, "failed"),
        (("FAILED", "NonZeroExitCode"), "preempted", False, "preempted"),
        (("FAILED", "NonZeroExitCode"), "preempted", True, "cancelled"),
        (("CANCELLED", "None"), "preempted", False, "cancelled"),
        (("CANCELLED", "None"), None, False, "cancelled"),
        (("TIMEOUT", "TimeLimit"), None, False, "failed"),
        (("PREEMPTED", "None"), None, False, "preempted"),
        (("NODE_FAIL", "NodeDown"), None, False, "failed"),
        (("", ""), "stopped", False, "stopped"),
        (("", ""), None, False, "unknown"),
        (("UNKNOWN", "no answer"), None, False, "unknown"),
    ],
)
def test_how_a_run_stands_is_what_its_files_and_slurm_say_together(
    queued: tuple[str, str],
    result: str | None,
    cancelled: bool,
    state: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs.note(tmp_path, "slurm", job="12", cluster="", output="")
    if result:
        said = {"status": result, "step": 3, "metrics": {}, "error": None}
        (tmp_path / "result.json").write_text(json.dumps(said))
    if cancelled:
        (tmp_path / "cancelled").touch()
    monkeypatch.setattr(Job, "_states", lambda self: [queued])
    assert Slurm(SlurmSettings()).status(tmp_path).state == state


def test_a_run_is_forbidden_to_start_again_before_its_job_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.note(tmp_path, "slurm", job="12", cluster="", output="")
    seen = []
    monkeypatch.setattr(Job, "cancel", lambda self: seen.append((self.number, (tmp_path / "cancelled").exists())) or "")
    monkeypatch.setattr(Job, "active", lambda self: not seen)
    Slurm(SlurmSettings()).cancel(tmp_path)
    assert seen == [("12", True)]


def test_a_run_that_failed_is_not_called_cancelled_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.note(tmp_path, "slurm", job="12", cluster="", output="")
    said = {"status": "failed", "step": 3, "metrics": {}, "error": "rank 1"}
    (tmp_path / "result.json").write_text(json.dumps(said))
    commands(tmp_path, monkeypatch, squeue="echo 'FAILED|NonZeroExitCode'")
    launcher = Slurm(SlurmSettings())
    launcher.cancel(tmp_path)
    assert launcher.status(tmp_path).state == "failed"


def test_a_cancel_that_slurm_does_not_hear_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.note(tmp_path, "slurm", job="12", cluster="", output="")
    deaf = "echo 'scancel: error: no controller' >&2; exit 1"
    commands(tmp_path, monkeypatch, squeue="echo 'RUNNING|None'", scancel=deaf)
    with pytest.raises(RunFailed, match="not told to end: scancel: error: no controller"):
        Slurm(SlurmSettings()).cancel(tmp_path)
    states = iter(["RUNNING", "COMPLETING", "COMPLETING", "COMPLETED"])  # it was ending by itself
    monkeypatch.setattr(Job, "_states", lambda self: [(next(states), "None")])
    Slurm(SlurmSettings()).cancel(tmp_path)
    assert not list(states)


def test_where_slurm_does_not_answer_a_start_names_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.note(tmp_path, "slurm", job="12", cluster="", output="")
    commands(tmp_path, monkeypatch, squeue="echo 'error: no such cluster' >&2; exit 1")
    launcher = Slurm(SlurmSettings())
    with pytest.raises(UserError, match=r"does not say: error: no such cluster") as raised:
        launcher.submit(spec(launcher, tmp_path))
    assert str(tmp_path / "launcher.json") in raised.value.faults[0].cure


def test_gpus_that_are_asked_for_by_an_option_are_seen_in_a_container() -> None:
    settings = SlurmSettings(container="apptainer", image="x", options=["--gres=gpu:a100:4"], procs=4)
    launcher = Slurm(settings)
    assert "--nv" in json.loads(launcher.render(spec(launcher)).files["slurm.json"])


def test_a_node_meets_the_others_by_slurms_word_for_who_it_is() -> None:
    said = {"SLURM_NODEID": "0", "SLURMD_NODENAME": "localhost"}
    assert node.meeting("a:1", "x", said) == Meeting("a:1", "x", hosts=True, address="localhost")
    said = {"SLURM_NODEID": "1", "SLURMD_NODENAME": "no.such.host.invalid"}
    assert node.meeting("a:1", "x", said) == Meeting("a:1", "x", hosts=False), "torch then finds a name by itself"
    assert node.meeting("a:1", "x", {}) == Meeting("a:1", "x")


def test_a_run_whose_job_is_not_over_is_not_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.note(tmp_path, "slurm", job="12", cluster="", output="")
    monkeypatch.setattr(Job, "_states", lambda self: [("PENDING", "Resources")])
    launcher = Slurm(SlurmSettings())
    with pytest.raises(UserError, match="is job 12 already"):
        launcher.submit(spec(launcher, tmp_path))


def test_nothing_of_a_run_changes_where_its_job_is_not_over(
    tiny_model: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of the start before would else be gone."""
    known = [f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "sharding=single", "steps=2"]
    plan = api.compose([*known, "launcher=slurm", f"run.dir={tmp_path}/run"])
    run = api.prepare(plan)
    jobs.note(run, "slurm", job="12", cluster="", output="")
    (run / "result.json").write_text("{}")
    monkeypatch.setattr(Job, "_states", lambda self: [("PENDING", "Resources")])
    with pytest.raises(UserError, match="is job 12 already"):
        api.prepare(plan)
    assert (run / "result.json").read_text() == "{}"


@pytest.mark.parametrize("key", ["threads", "restarts", "grace"])
def test_what_counts_below_nothing_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"launcher\.{key}"):
        Slurm(SlurmSettings(**{key: -1}))
