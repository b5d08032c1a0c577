"""What is made for SkyPilot: a task that its own package takes, and a script that trains as one process does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.tools import Tool
from loomtune.compose import quoted
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune_launchers import elsewhere
from loomtune_launchers.skypilot import skypilot
from loomtune_launchers.skypilot.settings import SkyPilotSettings
from loomtune_launchers.skypilot.skypilot import SkyPilot
from runs.worlds import free_port, maths

NASTY = """ a 'b' "c" $(id) $$(x) $HOME `id` ; & | > \\ \n\ttwo: lines # é"""
BUCKET = {"/bucket": {"name": "my-runs", "mode": "MOUNT"}}
RESULT = {"status": "completed", "step": 9, "metrics": {"loss": 0.5}, "error": None}

FULL: dict[str, Any] = {
    "nodes": 2,
    "accelerators": "H100:8",
    "infra": "aws/us-east-1",
    "cpus": "16+",
    "memory": "64+",
    "use_spot": True,
    "disk_size": 512,
    "image_id": "docker:me/loomtune:1",
    "file_mounts": {**BUCKET, "/data": "s3://my-data/rows"},
    "setup": "pip install loomtune\necho ready",
    "secrets": ["HF_TOKEN"],
    "environment": {"NASTY": NASTY},
    "restarts": 2,
}

VALIDATE = """
import json, sys
import sky
from sky.jobs.state import ManagedJobStatus
from sky.skylet.job_lib import JobStatus
states = [[one.value for one in kind] for kind in (JobStatus, ManagedJobStatus)]
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    (resources,) = task.resources
    print(json.dumps({
        "nodes": task.num_nodes, "envs": dict(task.envs), "run": task.run, "spot": resources.use_spot,
        "accelerators": resources.accelerators, "recovery": resources.job_recovery, "name": task.name, "states": states,
    }))
"""


def launcher(**settings: Any) -> SkyPilot:
    return SkyPilot(SkyPilotSettings(**{"file_mounts": BUCKET, **settings}))


def task(typed: tuple[str, ...] = (), **settings: Any) -> str:
    made = launcher(**settings)
    return made.render(made.spec(Path("runs/Mine"), made.processes(many=True), typed)).files["task.yaml"]


def sky_python() -> str:
    """An interpreter that has SkyPilot; skips the test where there is none."""
    named = os.environ.get("LOOMTUNE_SKY_PYTHON", "")
    if not named and importlib.util.find_spec("sky") is None:
        pytest.skip("SkyPilot is not installed here, and LOOMTUNE_SKY_PYTHON names no interpreter that has it")
    return named or sys.executable


def test_skypilots_own_package_takes_the_tasks(tmp_path: Path) -> None:
    python, paths = sky_python(), []
    several = {"plain": {}, "full": FULL, "managed": {**FULL, "managed": True}}
    for name, settings in several.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(task(**settings))
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text(task().replace("num_nodes", "nodes_num"))
    done = subprocess.run(
        [python, "-c", VALIDATE, *map(str, paths)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    plain, full, managed = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert plain["name"] == "loomtune-mine"
    assert (full["nodes"], full["accelerators"], full["spot"]) == (2, {"H100": 8}, True)
    assert full["run"] == yaml.safe_load(task(**FULL))["run"]
    assert managed["recovery"]["recover_on_exit_codes"] == [75]
    assert plain["recovery"] is None
    known = {name for names in plain["states"] for name in names}
    assert set(skypilot.STATES) <= known
    assert all(word in name for name in known - set(skypilot.STATES) for word in ["FAILED"])
    refused = subprocess.run(
        [python, "-c", VALIDATE, str(faulty)], capture_output=True, text=True, timeout=300, check=False
    )
    assert refused.returncode != 0
    assert "nodes_num" in refused.stderr + refused.stdout


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_the_script_trains_on_two_machines_as_one_process_does(
    restarts: int, tied_model: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "optimizer.lr=1e-3"]
    settings += ["tracker=[jsonl]", "steps=3", "checkpoint.background=false"]
    alone = [sys.executable, "-m", "loomtune.train", *settings, f"run.dir={tmp_path / 'alone'}"]
    subprocess.run(alone, check=True, timeout=300, capture_output=True)
    monkeypatch.setattr(elsewhere, "PORT", free_port())
    typed = (*settings, "sharding=ddp", f"run.name={quoted(NASTY)}")
    place = {"python": sys.executable, "run_dir": str(tmp_path / "run"), "volumes": {str(tmp_path): "disk"}}
    rendered = yaml.safe_load(task(typed, nodes=2, restarts=restarts, **place))
    nodes = [
        subprocess.Popen(
            ["bash", "-c", rendered["run"]],
            env={**os.environ, **rendered["envs"], **_place(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for key, bound in (("loss", 2e-6), ("grad_norm", 1e-5)):
        one, other = ([line[key] for line in maths(tmp_path / name)] for name in ("run", "alone"))
        assert len(one) == 3
        assert one == pytest.approx(other, rel=bound)
    assert Plan.load(tmp_path / "run").root.run.name == NASTY
    assert elsewhere.result(said[0].splitlines()) == json.loads((tmp_path / "run" / "result.json").read_text())


def _place(rank: int) -> dict[str, str]:
    """As SkyPilot tells a machine which it is; both are this one."""
    return {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}


def test_nothing_that_users_set_is_in_the_script() -> None:
    typed = (f"run.name={quoted(NASTY)}",)
    plain, full = (yaml.safe_load(text) for text in (task(nodes=2), task(typed, nodes=2, environment={"NASTY": NASTY})))
    assert plain["run"] == full["run"]
    assert list(full["envs"]) == ["LOOMTUNE_PACKED"]
    assert full["envs"]["LOOMTUNE_PACKED"] != plain["envs"]["LOOMTUNE_PACKED"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["sky", "launch", "--cluster", "loomtune-mine", "--down", "--yes", "--detach-run"]),
        ({"down": False}, ["sky", "launch", "--cluster", "loomtune-mine", "--yes", "--detach-run"]),
        ({"managed": True}, ["sky", "jobs", "launch", "--name", "loomtune-mine", "--yes", "--detach-run"]),
        (
            {"secrets": ["HF_TOKEN"], "job": "it"},
            ["sky", "launch", "--cluster", "it", "--down", "--yes", "--detach-run", "--secret", "HF_TOKEN"],
        ),
    ],
)
def test_it_is_launched_by_the_command_that_is_shown(settings: dict[str, Any], words: list[str]) -> None:
    made = launcher(**settings)
    (command,) = made.render(made.spec(Path("/runs/mine"), 1)).commands
    assert list(command) == [*words, "/runs/mine/task.yaml"]


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"file_mounts": {}}, r"launcher\.down=false"),
        ({"file_mounts": {}, "down": False, "nodes": 2}, r"launcher\.volumes"),
        ({"file_mounts": {}, "down": False, "managed": True}, r"launcher\.volumes"),
        ({"file_mounts": {"/data": "s3://copied"}}, r"launcher\.volumes"),
        ({"file_mounts": {"/data": {"source": "s3://copied", "mode": "COPY"}}}, r"launcher\.volumes"),
        ({"run_dir": "/home/run"}, "/bucket"),
        ({"accelerators": "8xH100"}, r"launcher\.accelerators=H100:8"),
        ({"cpus": "many"}, r"launcher\.cpus='64\+'"),
        ({"nodes": 0}, r"launcher\.nodes=1"),
        ({"environment": {"MASTER_ADDR": "x"}}, "leave MASTER_ADDR out"),
        ({"environment": {"A": "x"}, "secrets": ["A"]}, "leave one of them out"),
        ({"job": "My_Job"}, r"launcher\.job"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(settings: dict[str, Any], cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        launcher(**settings)


def test_one_machine_that_stays_may_keep_the_run() -> None:
    made = launcher(file_mounts={}, down=False)
    assert made.spec(Path("runs/mine"), 1).arguments[-1] == "run.dir='runs/loomtune-mine'"


def test_processes_are_one_for_each_gpu() -> None:
    assert launcher(accelerators="H100:8", nodes=2).processes(many=True) == 16
    assert launcher(accelerators="H100").processes(many=True) == 1
    assert launcher(accelerators="H100:8").processes(many=False) == 1
    assert launcher().processes(many=True) == 1


@pytest.fixture
def sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    return Tool("sky", tmp_path, monkeypatch)


@pytest.fixture(params=[False, True], ids=["own machines", "managed"])
def started(request: pytest.FixtureRequest, sky: Tool, tmp_path: Path) -> tuple[SkyPilot, Path]:
    made = launcher(managed=request.param)
    made.submit(made.spec(tmp_path / "mine", 1))
    return made, tmp_path / "mine"


def queue(made: SkyPilot, *statuses: str) -> str:
    """What `sky queue` or `sky jobs queue` prints: the jobs of the run's name, and another."""
    records = [{"job_id": i, "job_name": "loomtune-mine", "status": status} for i, status in enumerate(statuses)]
    records.insert(0, {"job_id": 99, "job_name": "other", "status": "FAILED"})
    table: Any = records if made.settings.managed else {"loomtune-mine": records}
    return "Fetching...\n" + json.dumps(table, indent=2)


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        (["PENDING"], "pending"),
        (["SUCCEEDED", "RUNNING"], "running"),
        (["SUCCEEDED"], "completed"),
        (["CANCELLED"], "cancelled"),
        (["FAILED_SETUP"], "failed"),
        ([], "unknown"),
    ],
)
def test_skypilot_says_how_a_run_stands(
    statuses: list[str], state: str, started: tuple[SkyPilot, Path], sky: Tool
) -> None:
    made, run = started
    sky.answer("queue", says=queue(made, *statuses))
    assert made.status(run).state == state


def test_an_ended_run_stands_as_its_result_says(started: tuple[SkyPilot, Path], sky: Tool) -> None:
    made, run = started
    sky.answer("queue", says=queue(made, "FAILED"))
    sky.answer("logs", says=f"(loomtune-mine, pid=7) loomtune-result {json.dumps({**RESULT, 'status': 'preempted'})}")
    assert (made.status(run).state, made.status(run).detail) == ("preempted", "step 9")
    assert made.status(run).state == "preempted"


def test_logs_are_skypilots_without_colours(started: tuple[SkyPilot, Path], sky: Tool) -> None:
    made, run = started
    sky.answer("logs", says="\x1b[36m(loomtune-mine, pid=7)\x1b[0m [rank 0] step 1")
    assert list(made.logs(run)) == ["(loomtune-mine, pid=7) [rank 0] step 1"]
    assert "--no-follow" in sky.calls[-1]
    assert list(made.logs(run, follow=True)) == ["(loomtune-mine, pid=7) [rank 0] step 1"]
    assert "--no-follow" not in sky.calls[-1]


def test_cancelling_gives_the_machines_back(started: tuple[SkyPilot, Path], sky: Tool) -> None:
    made, run = started
    made.cancel(run)
    managed = ["jobs", "cancel", "--name", "loomtune-mine", "--yes"]
    assert sky.calls[-1] == (managed if made.settings.managed else ["down", "loomtune-mine", "--yes"])
    sky.answer("queue", says=queue(made))
    assert made.status(run).state == "cancelled"


def test_cancelling_on_machines_that_stay_ends_the_job_alone(sky: Tool, tmp_path: Path) -> None:
    made = launcher(down=False)
    made.submit(made.spec(tmp_path / "mine", 1))
    made.cancel(tmp_path / "mine")
    assert sky.calls[-1] == ["cancel", "loomtune-mine", "--all", "--yes"]


def test_a_run_that_goes_on_is_not_started_twice(started: tuple[SkyPilot, Path], sky: Tool) -> None:
    made, run = started
    sky.answer("queue", says=queue(made, "RUNNING"))
    with pytest.raises(UserError, match="loomtune cancel"):
        made.submit(made.spec(run, 1))
    sky.answer("queue", says=queue(made, "FAILED"))
    made.submit(made.spec(run, 1))
    launches = [call for call in sky.calls if "launch" in call]
    assert len(launches) == 2 and launches[0] == launches[1]


def test_a_run_does_not_join_the_machines_of_another_of_its_name(sky: Tool, tmp_path: Path) -> None:
    made = launcher()
    sky.answer("queue", says=queue(made, "RUNNING"))
    with pytest.raises(UserError, match=r"set launcher\.job="):
        made.submit(made.spec(tmp_path / "mine", 1))
    assert not [call for call in sky.calls if "launch" in call]


def test_a_launch_that_failed_halfway_can_be_cancelled(sky: Tool, tmp_path: Path) -> None:
    made = launcher()
    sky.answer("launch", says="no machines left", code=1)
    with pytest.raises(UserError, match="what sky says above"):
        made.submit(made.spec(tmp_path / "mine", 1))
    made.cancel(tmp_path / "mine")
    assert sky.calls[-1] == ["down", "loomtune-mine", "--yes"]


@pytest.mark.parametrize(
    ("why", "state"),
    [
        ("sky.exceptions.ClusterDoesNotExist: Cluster 'loomtune-mine' does not exist.", "unknown"),
        ("sky.exceptions.ClusterNotUpError: skipped for cluster 'loomtune-mine' (status: STOPPED).", "unknown"),
        ("sky.exceptions.ClusterNotUpError: skipped for cluster 'loomtune-mine' (status: INIT).", "pending"),
        ("sky.exceptions.CommandError: no route to host", None),
    ],
)
def test_machines_that_cannot_be_asked_are_not_taken_for_given_back(
    why: str, state: str | None, sky: Tool, tmp_path: Path
) -> None:
    made = launcher()
    made.submit(made.spec(tmp_path / "mine", 1))
    sky.answer("queue", says=f"\x1b[33mFailed to get the job queue for cluster 'loomtune-mine'.\x1b[0m\n  {why}\n{{}}")
    if state:
        assert made.status(tmp_path / "mine").state == state
        return
    with pytest.raises(UserError, match="no route to host"):
        made.status(tmp_path / "mine")


def test_a_run_whose_cancellation_failed_is_not_called_cancelled(started: tuple[SkyPilot, Path], sky: Tool) -> None:
    made, run = started
    sky.answer("--yes", says="no such cloud", code=1)
    with pytest.raises(UserError, match="no such cloud"):
        made.cancel(run)
    sky.answer("queue", says=queue(made, "RUNNING"))
    assert made.status(run).state == "running"


def test_a_missing_sky_is_told_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install sky"):
        launcher().submit(launcher().spec(tmp_path / "mine", 1))
