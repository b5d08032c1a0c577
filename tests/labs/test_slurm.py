"""launcher=slurm on a real Slurm of two nodes: runs that are preempted, lose a node or their time, or are cancelled."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from labs.slurm import Cluster, cluster, until, why_not
from loomtune import api
from loomtune.compose import quoted
from loomtune.contracts import JobSpec, Launcher
from loomtune.errors import UserError
from loomtune_launchers.slurm.settings import SlurmSettings
from loomtune_launchers.slurm.slurm import Slurm
from runs.processes import COMMAND
from runs.processes import run as run_to_end

LOSS, NORM = 2e-6, 1e-5
"""The bounds of the promise that the maths does not depend on the machine, relative, over `FIRST` steps."""

FIRST = 40

STEPS = 200
"""So many that a run is still at it when what is to happen to it happens."""

ODD = 'it\'s "quoted" $(touch /tmp/loomtune-was-here) `id` %j ; & | * ~\n  two lines é'

WITNESS = """
import json, os, sys
from pathlib import Path
run = Path(sys.argv[1])
said = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
(run / f"witness-{os.environ['RANK']}.json").write_text(json.dumps(said))
(run / "result.json").write_text(json.dumps({"status": "completed", "step": 0, "metrics": {}, "error": None}))
"""


@dataclass(frozen=True)
class Lab:
    """The cluster, and the settings of a run."""

    slurm: Cluster
    settings: tuple[str, ...]

    def train(self, run: Path, *more: str) -> Launcher:
        """Submits a run on two nodes of one process each; gives its launcher."""
        words = ("launcher=slurm", "launcher.nodes=2", "sharding=ddp", f"run.dir={quoted(str(run))}")
        api.train([*self.settings, f"steps={STEPS}", *words, *more])
        return api.launched(run)

    def ended(self, launcher: Launcher, run: Path) -> str:
        """How the run ended, once Slurm is done with its job."""
        until(lambda: not self.queued(), "the end of the job")
        return launcher.status(run).state

    def queued(self) -> str:
        """Jobs that wait, run, or are being ended."""
        return self.slurm.run("squeue", "--noheader", "--format=%i %T")

    def state(self, job: str) -> str:
        """Slurm's last word on a job."""
        return self.slurm.run("squeue", "--noheader", "--states=all", "--array", f"--jobs={job}", "--format=%T").strip()

    def preempt(self) -> None:
        """A job of more weight that wants all nodes, for a moment."""
        self.slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")


@pytest.fixture(scope="module")
def lab(tiny_model: Path, mixed_data: Path) -> Iterator[Lab]:
    if why := why_not():
        pytest.skip(why)
    settings = (f"model.path={tiny_model}", "data=jsonl", f"data.path={mixed_data}", "optimizer.lr=1e-3")
    with cluster() as slurm, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{slurm.commands}:/usr/bin:/bin:/usr/sbin:/sbin")
        yield Lab(slurm, (*settings, "tracker=[jsonl,console]", "batch.micro=4"))


@pytest.fixture(autouse=True)
def nothing_left(lab: Lab) -> Iterator[None]:
    """Each test begins on idle nodes, whatever became of the one before, and leaves no process on them."""
    yield
    if lab.queued():
        lab.slurm.run("scancel", "--user=root")
    until(lambda: not lab.queued(), "the end of all jobs")
    until(lambda: not lab.slurm.left(), "the end of all processes", patience=10.0)


@pytest.fixture(scope="module")
def alone(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Every step of the same run on one process, without Slurm."""
    run = tmp_path_factory.mktemp("alone") / "run"
    api.train([*lab.settings, f"steps={STEPS}", "sharding=single", "launcher.procs=1", f"run.dir={run}"])
    return steps(run)


def steps(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def assert_same(run: Path, alone: Sequence[dict[str, float]]) -> None:
    """Every step once, with the losses and gradient norms of one process."""
    found = steps(run)
    assert [step["step"] for step in found] == [step["step"] for step in alone][: len(found)]
    for key, bound in (("loss", LOSS), ("grad_norm", NORM)):
        pairs = list(zip(found, alone, strict=False))
        apart = max(abs(one[key] / other[key] - 1) for one, other in pairs[:FIRST])
        whole = max(abs(one[key] / other[key] - 1) for one, other in pairs)
        print(f"{key}: {apart:.1e} over {FIRST} steps, {whole:.1e} over all")
        assert apart <= bound and whole <= 20 * bound


def under_way(run: Path, least: int = 3) -> Callable[[], bool]:
    return lambda: len(steps(run)) >= least


@pytest.mark.parametrize("procs", [1, 2])
def test_a_run_on_two_nodes_is_followed_to_its_end_and_has_the_losses_of_one_process(
    procs: int, lab: Lab, alone: list[dict[str, float]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "it's a run, $(id)"
    launcher = lab.train(run, f"launcher.procs={procs}", "launcher.wait=true", f"stop_after={FIRST}")
    shown = capfd.readouterr().out
    said = json.loads((run / "launcher.json").read_text())
    assert launcher.status(run).state == "stopped"
    assert lab.state(said["job"]) == "COMPLETED"
    (attempt,) = (run / "logs").iterdir()
    assert attempt.name == f"{said['job']}-0" and len(list(attempt.iterdir())) == 2 * procs
    assert "rank 0 node0 | " in shown and f"step {FIRST}/" in shown, shown
    assert list(launcher.logs(run)) and not lab.slurm.left()
    assert_same(run, alone)


def test_a_preempted_run_is_queued_again_and_ends_as_if_nothing_had_happened(
    lab: Lab, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = lab.train(run)
    until(under_way(run), "the first steps")
    assert launcher.status(run).state == "running"
    lab.preempt()
    until(lambda: launcher.status(run).state == "pending", "the job being queued again")
    done = len(steps(run))
    assert (run / "checkpoints" / "LATEST").read_text().strip() == f"step-{done:08d}", "it saved before it left"
    assert 3 <= done < STEPS
    assert lab.ended(launcher, run) == "completed"
    assert len(list((run / "logs").iterdir())) == 2
    assert "queued again, 1 of 10 times" in "\n".join(launcher.logs(run))
    assert_same(run, alone)


def test_what_is_left_of_the_requeues_is_what_slurm_may_do(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = lab.train(run, "launcher.requeues=0")
    until(under_way(run), "the first steps")
    lab.preempt()
    assert lab.ended(launcher, run) == "preempted"
    assert len(list((run / "logs").iterdir())) == 1
    assert "launcher.requeues=0 is used up" in "\n".join(launcher.logs(run))


def test_the_time_limit_is_a_preemption(lab: Lab, alone: list[dict[str, float]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = lab.train(run, "launcher.time=180", "launcher.grace=30")
    until(under_way(run), "the first steps")
    job = json.loads((run / "launcher.json").read_text())["job"]
    lab.slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@30 makes Slurm send
    until(lambda: launcher.status(run).state == "pending", "the job being queued again")
    assert lab.ended(launcher, run) == "completed"
    assert not (run / "stop").exists()
    assert_same(run, alone)


def test_a_killed_node_costs_what_was_not_yet_committed(
    lab: Lab, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = lab.train(run, "checkpoint.every=10")
    until(under_way(run, 30), "some checkpoints")
    lab.slurm.kill(1)
    seen = ("sinfo", "--noheader", "--Node", "--format=%n %T")
    until(lambda: "node1 down" in lab.slurm.run(*seen), "the loss being seen")
    done, kept = len(steps(run)), int((run / "checkpoints" / "LATEST").read_text().strip().removeprefix("step-"))
    print(f"lost in step {done}, goes on after step {kept}")
    assert 0 <= done - kept <= 20, "no more than since the checkpoint before"
    assert launcher.status(run).state in ("running", "pending")
    lab.slurm.revive(1)
    assert lab.ended(launcher, run) == "completed"
    assert len(list((run / "logs").iterdir())) == 2
    assert_same(run, alone)


@pytest.mark.parametrize("how", ["cancel", "scancel"])
def test_a_cancelled_run_leaves_nothing_and_stays_away(how: str, lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = lab.train(run)
    until(under_way(run), "the first steps")
    job = json.loads((run / "launcher.json").read_text())["job"]
    if how == "cancel":
        launcher.cancel(run)
        assert (run / "cancelled").exists()
    else:
        lab.slurm.run("scancel", job)
        until(lambda: not lab.queued(), "the end of the job")
    assert not lab.queued() and not lab.slurm.left()
    assert launcher.status(run).state == "cancelled" and lab.state(job) == "CANCELLED"
    assert len(list((run / "logs").iterdir())) == 1


def test_a_second_start_beside_the_first_is_refused(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = lab.train(run, "launcher.options=[--hold]")
    assert launcher.status(run).state == "pending"
    with pytest.raises(UserError, match=r"is job \d+ already"):
        lab.train(run)
    launcher.cancel(run)
    assert launcher.status(run).state == "cancelled" and not lab.queued()
    assert lab.train(run, f"stop_after={3}").status(run).state in ("pending", "running")
    until(lambda: not lab.queued(), "the end of the job")


def test_an_array_runs_two_of_its_runs_at_once_and_one_can_be_cancelled(
    lab: Lab, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    specs = [item(lab, tmp_path / f"it's item {seed}", seed) for seed in range(5)]
    launcher = api.launched(specs[0].run)
    number = launcher.submit_all(specs, at_once=2)
    launcher.cancel(specs[4].run)
    most = 0

    def over() -> bool:
        nonlocal most
        queued = lab.queued()
        most = max(most, queued.count("RUNNING"))
        return not queued

    until(over, "the end of all")
    assert most == 2
    found = [launcher.status(spec.run).state for spec in specs]
    assert found == ["stopped"] * 4 + ["cancelled"]
    assert [lab.state(f"{number}_{i}") for i in range(4)] == ["COMPLETED"] * 4
    assert not list(specs[4].run.glob("logs/*")), "it was cancelled before it began"
    assert_same(specs[0].run, alone)
    losses = {steps(spec.run)[-1]["loss"] for spec in specs[:4]}
    assert len(losses) == 4, "each has its own seed"
    assert f"step {FIRST}/" in "\n".join(launcher.logs(specs[3].run)) and not lab.slurm.left()


def test_a_sweep_of_four_is_one_array(lab: Lab, tmp_path: Path) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    words = ["seed=0,1,2,3", "steps=10", "sharding=single", "launcher=slurm", "launcher.wait=false"]
    command = [*COMMAND, "train", "-m", *lab.settings, *words, "hydra.launcher.jobs=2", f"hydra.sweep.dir={folder}"]
    assert run_to_end(command, log) == 0, log.read_text()
    records = [json.loads(path.read_text()) for path in folder.glob("*/launcher.json")]
    array = records[0]["job"].partition("_")[0]
    assert sorted(record["job"] for record in records) == [f"{array}_{i}" for i in range(4)]
    assert {api.Result.of(path.parent).status for path in folder.glob("*/launcher.json")} == {"completed"}
    assert len({steps(path.parent)[-1]["loss"] for path in folder.glob("*/launcher.json")}) == 4


def item(lab: Lab, run: Path, seed: int) -> JobSpec:
    """A prepared run of one process."""
    words = (f"seed={seed}", f"stop_after={FIRST}", "sharding=single", f"run.dir={quoted(str(run))}")
    plan = api.compose([*lab.settings, f"steps={STEPS}", "launcher=slurm", *words])
    api.check(plan)
    launcher = api.launched(api.prepare(plan))
    return launcher.spec(run, plan.processes)


def test_values_arrive_literally(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "witness.py").write_text(WITNESS)
    folder, run = tmp_path / ODD.replace("/", "_"), tmp_path / "runs" / ODD.replace("/", "_")
    folder.mkdir()
    monkeypatch.chdir(folder)
    environment = {"LOOM_ODD": ODD, "LOOM_EMPTY": "", "PYTHONPATH": str(tmp_path)}
    setup = ["export LOOM_SETUP=$((6 * 7))", "# a remark", "export LOOM_ODD=setup-is-older-than-the-environment"]
    settings = SlurmSettings(nodes=2, procs=2, environment=environment, setup=setup, cpus=1, gpus=1, wait=True)
    launcher = Slurm(settings)
    spec = replace(launcher.spec(run, 4), module="witness", arguments=(str(run), ODD, "--a b"))
    launcher.submit(spec)
    assert launcher.status(run).state == "completed"
    found = [json.loads(path.read_text()) for path in sorted(run.glob("witness-*"))]
    assert len(found) == 4
    for said in found:
        assert said["arguments"] == [str(run), ODD, "--a b"] and said["folder"] == str(folder)
        assert {key: said["environment"][key] for key in environment} == environment
        assert said["environment"]["LOOM_SETUP"] == "42"
        assert not any(name.startswith("SLURM_") for name in said["environment"])
    assert not Path("/tmp/loomtune-was-here").exists()
    assert list(run.glob("slurm-*.out"))


@pytest.mark.parametrize("come", [1, 2])
def test_as_many_nodes_take_part_as_are_free(come: int, lab: Lab, tmp_path: Path) -> None:
    idle = ("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D")
    until(lambda: lab.slurm.run(*idle).strip() == "2", "both nodes being free")
    if come == 1:
        lab.slurm.run(
            "sbatch", "--partition=high", "--nodelist=node0", "--exclusive", "-o/dev/null", "--wrap=sleep 600"
        )
        until(lambda: lab.slurm.run(*idle).strip() == "1", "one node being taken")
    (tmp_path / "witness.py").write_text(WITNESS)
    environment, run = {"PYTHONPATH": str(tmp_path)}, tmp_path / "run"
    launcher = Slurm(SlurmSettings(nodes="1:2", cpus=2, gpus=1, environment=environment, wait=True))
    launcher.submit(replace(launcher.spec(run, 2), module="witness", arguments=(str(run),)))
    lab.slurm.run("scancel", "--partition=high")
    worlds = [json.loads(path.read_text())["environment"]["WORLD_SIZE"] for path in run.glob("witness-*")]
    assert worlds == [str(come)] * come and launcher.status(run).state == "completed"


def test_a_job_that_fails_is_not_tried_again(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "witness.py").write_text("import sys; sys.exit(2)")
    launcher = Slurm(SlurmSettings(environment={"PYTHONPATH": str(tmp_path)}, wait=True))
    spec = replace(launcher.spec(tmp_path / "run", 1), module="witness", arguments=())
    job = launcher.submit(spec)
    assert launcher.status(spec.run).state == "failed" and lab.state(job) == "FAILED"
    assert len(list((spec.run / "logs").iterdir())) == 1


def test_a_container_gets_the_run_and_what_is_mounted(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for apptainer, which notes its arguments and becomes the command."""
    (tmp_path / "witness.py").write_text(WITNESS)
    stand_in = lab.slurm.commands / "apptainer"
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > "{tmp_path}/asked"\nshift 4; exec "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    container = {"container": "apptainer", "image": "an image.sif", "mounts": ["/data:/data"], "wait": True}
    settings = SlurmSettings(python=sys.executable, environment={"PYTHONPATH": str(tmp_path)}, **container)
    launcher, run = Slurm(settings), tmp_path / "run"
    launcher.submit(replace(launcher.spec(run, 1), module="witness", arguments=(str(run),)))
    asked = (tmp_path / "asked").read_text().split("\0")
    binds = f"--bind={run}:{run},{tmp_path}:{tmp_path},/data:/data"
    assert asked[:4] == ["exec", binds, f"--pwd={tmp_path}", "an image.sif"]
    assert launcher.status(run).state == "completed"
