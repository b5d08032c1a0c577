"""What users set arrives at the ranks as it is, through every launcher: no shell and no template reads it on the way.

Engines that are not here are played by small programs that run what they are given, as the engine would: `ssh` through
a shell, `sbatch` as a script, a pod as the kubelet expands it, a machine of SkyPilot's as a script under bash.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launchers.kubelet import expanded
from loomtune import api
from loomtune.compose import quoted
from loomtune.contracts import JobSpec, Launcher
from loomtune.errors import UserError
from loomtune_launchers import jobs, torchrun
from loomtune_launchers.kubernetes.kubernetes import Kubernetes
from loomtune_launchers.kubernetes.settings import KubernetesSettings
from loomtune_launchers.local import Local
from loomtune_launchers.ray.node import Node
from loomtune_launchers.ray.ray import Ray
from loomtune_launchers.ray.settings import RaySettings
from loomtune_launchers.settings import LocalSettings
from loomtune_launchers.skypilot.settings import SkyPilotSettings
from loomtune_launchers.skypilot.skypilot import SkyPilot
from loomtune_launchers.slurm.settings import SlurmSettings
from loomtune_launchers.slurm.slurm import Slurm
from loomtune_launchers.ssh.settings import SshSettings
from loomtune_launchers.ssh.ssh import Ssh

PATIENCE = 240.0
"""Seconds until what is waited for counts as hanging."""

VALUES = [
    "",
    " ",
    "  two  words, and  more ",
    "it's",
    'she said "so"',
    "'\"'\"'",
    "line\nline\n\nline\n",
    "tab\there\r\nand there",
    "$(touch executed)",
    "`touch executed`",
    "; touch executed; #",
    "a && touch executed || touch executed | touch executed & > executed",
    "'$(touch executed)'\"$(touch executed)\"",
    "\n touch executed \n",
    "${HOME} $HOME ~ $$ $$$ $? $0 $1 $@ $* !! !$",
    "$(PET_NODE_RANK) $$(PET_NODE_RANK) ${rank} ${{rank}} $PATH",
    "%j %A_%a %% %(asctime)s %d 100%",
    "{} {0} {name} {{ jinja }} {% raw %} <% erb %>",
    "back\\slash \\n \\\\ \\$ \\",
    "--nnodes=7",
    "-x",
    "--",
    "a=b=c, d:e; [f, 'g'] {h: i}",
    "* ? [a-z] {a,b} #no comment",
    "yes",
    "1e3",
    "0o17",
    "null",
    "@file",
    "Gewebe ≠ 織物 🧵 é\u0301 \u202e \u00a0",
    "\x01\x1b[31m\x7f",
    "long " * 2000,
]

FOLDER = "a 'b' \"c\" $(touch executed) `touch executed`; touch executed & $$ $HOME ${rank} % %j {} [x] *?#!~=,: 織 -n"
"""Of a run, where a folder may be named so."""

ENVIRONMENT = {f"VALUE_{number}": value for number, value in enumerate(VALUES)}

TELLING = """
import json, os, sys
with open(os.environ["TOLD"] + ".new", "w") as file:
    json.dump({"arguments": sys.argv[1:], "environment": dict(os.environ)}, file)
os.rename(os.environ["TOLD"] + ".new", os.environ["TOLD"])
"""
"""Stands in training's place."""

SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
shift 2
exec sh -c "$*"
"""
"""sshd hands what was asked for to the login shell, its words joined by spaces."""

SBATCH = """#!{python} -S
import os, subprocess, sys
*options, script = sys.argv[1:]
assert all(option.startswith("--") for option in options), options
said = {{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_RESTART_COUNT": "0"}}
print(7, flush=True)
with open({log!r}, "ab") as log:
    sys.exit(subprocess.run(["bash", script], env=os.environ | said, stdout=log, stderr=log).returncode * 0)
"""
"""Runs the script before it answers."""

SRUN = """#!{python} -S
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1:]
os.execvp(words[0], words)
"""

SLURM = {
    "sbatch": SBATCH,
    "srun": SRUN,
    "scontrol": "#!/bin/sh\ncase $2 in hostnames) echo 127.0.0.1;; *) echo JobState=RUNNING;; esac\n",
    "squeue": "#!/bin/sh\nexit 0\n",
    "sacct": "#!/bin/sh\nexit 0\n",
}


class Scene:
    """A working folder that must stay empty, programs that come first, and a module that tells what it was given."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.run, self.told, self.work = folder / "runs" / FOLDER, folder / "told", folder / "work"
        self._bin = folder / "bin"
        for made in (self.work, self._bin):
            made.mkdir()
        (folder / "modules").mkdir()
        (folder / "modules" / "telling.py").write_text(TELLING)
        patch.chdir(self.work)
        patch.setenv("PATH", f"{self._bin}{os.pathsep}{os.environ['PATH']}")
        paths = [str(folder / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("TOLD", str(self.told))

    def program(self, name: str, text: str) -> None:
        (self._bin / name).write_text(text)
        (self._bin / name).chmod(0o755)

    def job(self, launcher: Launcher, typed: tuple[str, ...] = ()) -> JobSpec:
        """The launcher's own job for the run, but that its ranks tell what they were given, the values among it."""
        spec = launcher.spec(self.run, 1, typed)
        return replace(spec, module="telling", arguments=(*spec.arguments, *VALUES))

    def check(self, arguments: list[str]) -> None:
        """Every value came, after the other arguments, and nothing was carried out."""
        until = time.monotonic() + PATIENCE
        while not self.told.exists():
            assert time.monotonic() < until, "no rank has told what it was given"
            time.sleep(0.05)
        told = json.loads(self.told.read_text())
        assert told["arguments"] == [*arguments, *VALUES]
        assert {name: told["environment"].get(name) for name in ENVIRONMENT} == ENVIRONMENT
        assert not list(self.work.iterdir()), "nothing was carried out"
        assert not list(self.told.parent.rglob("executed"))


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


@pytest.mark.parametrize("procs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_local(procs: int, scene: Scene) -> None:
    launcher = Local(LocalSettings(environment=dict(ENVIRONMENT), procs=procs))
    scene.run.mkdir(parents=True)
    launcher.submit(replace(scene.job(launcher), procs=procs))
    scene.check([str(scene.run)])


@pytest.mark.parametrize("agent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ray(agent: bool, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an actor does, which Ray gives its arguments as they are: pickled."""
    pytest.importorskip("ray", reason="needs loomtune[ray]")
    launcher = Ray(RaySettings(environment=dict(ENVIRONMENT)))
    scene.run.mkdir(parents=True)
    if not agent:  # the time that torch takes to import
        monkeypatch.setattr(torchrun, "command", lambda spec, _: (sys.executable, "-m", spec.module, *spec.arguments))
    node = Node()
    where = node.hello(str(scene.run), "now")
    meeting = {"endpoint": f"127.0.0.1:{where['port']}", "attempt": "now", "hosts": True, "address": "127.0.0.1"}
    node.start(jobs.text(scene.job(launcher)), meeting, str(scene.work))
    while node.hear(0.2)[1] is None:
        pass
    scene.check([str(scene.run)])


@pytest.mark.slow
def test_ssh(scene: Scene) -> None:
    scene.program("ssh", SSH)
    launcher = Ssh(SshSettings(hosts=["localhost"], procs=1, environment=dict(ENVIRONMENT)))
    scene.run.mkdir(parents=True)
    launcher.submit(scene.job(launcher))
    scene.check([str(scene.run)])


@pytest.mark.slow
def test_slurm(scene: Scene) -> None:
    for name, text in SLURM.items():
        log = str(scene.told.with_name("log"))
        scene.program(name, text.format(python=sys.executable, log=log) if name in ("sbatch", "srun") else text)
    launcher = Slurm(SlurmSettings(procs=1, environment=dict(ENVIRONMENT)))
    launcher.submit(scene.job(launcher))
    scene.check([str(scene.run)])


TYPED = tuple(f"data.prompt={quoted(value)}" for value in VALUES)
"""As a user types it so that the value is what is meant, which the job's own composition reads again."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_kubernetes(kind: str, scene: Scene) -> None:
    """As the kubelet expands the manifest; the folder there has a name that every template leaves alone."""
    settings = {
        "kind": kind,
        "python": sys.executable,
        "image": "here",
        "volume": "here",
        "mount": str(scene.work.parent),
    }
    launcher = Kubernetes(KubernetesSettings(**settings, procs=1, environment=dict(ENVIRONMENT)))
    job = scene.job(launcher, TYPED)
    command, environment = expanded(yaml.safe_load(launcher.render(job).files["job.yaml"]), 0, "127.0.0.1")
    port = {"PET_MASTER_PORT": _free_port()}
    done = _finished(command, environment | port)
    assert done.returncode == 0, done.stderr
    scene.check([*TYPED, "launcher=local", f"run.dir='{_folder(job)}'"])


@pytest.mark.slow
def test_skypilot(scene: Scene) -> None:
    settings = {"python": sys.executable, "volumes": {str(scene.work.parent): "here"}}
    launcher = SkyPilot(SkyPilotSettings(**settings, procs=1, environment=dict(ENVIRONMENT)))
    job = scene.job(launcher, TYPED)
    task = yaml.safe_load(launcher.render(job).files["task.yaml"])
    script = task["run"].replace("29500", _free_port())
    machine = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1"}
    done = _finished(["bash", "-c", script], {**task["envs"], **machine})
    assert done.returncode == 0, done.stderr
    scene.check([*TYPED, "launcher=local", f"run.dir='{_folder(job)}'"])


def _finished(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=PATIENCE, check=False)


def _folder(job: JobSpec) -> str:
    (found,) = [word for word in job.arguments if word.startswith("run.dir=")]
    return found.removeprefix("run.dir=").strip("'")


def _free_port() -> str:
    from runs.worlds import free_port

    return str(free_port())


def test_what_is_typed_is_what_the_launcher_is_given() -> None:
    given = {name: value for name, value in ENVIRONMENT.items() if "${" not in value}  # which refers to a setting
    typed = ", ".join(f"{name}: {quoted(value)}" for name, value in given.items())
    plan = api.compose([f"launcher.environment={{{typed}}}", "sharding=single"])
    assert plan.choices("launcher")["local"]["environment"] == given


def test_what_a_dry_run_shows_a_shell_reads_as_it_is() -> None:
    job = JobSpec(run=Path("run"), arguments=tuple(VALUES))
    (command,) = Local(LocalSettings()).render(job).commands
    assert shlex.split(shlex.join(command))[-len(VALUES) :] == VALUES


GIVEN: dict[str, Callable[[dict[str, str]], Launcher]] = {
    "local": lambda given: Local(LocalSettings(environment=given)),
    "ray": lambda given: Ray(RaySettings(environment=given)),
    "ssh": lambda given: Ssh(SshSettings(hosts=["localhost"], procs=1, environment=given)),
    "slurm": lambda given: Slurm(SlurmSettings(environment=given)),
    "kubernetes": lambda given: Kubernetes(KubernetesSettings(image="i", volume="v", environment=given)),
    "skypilot": lambda given: SkyPilot(SkyPilotSettings(volumes={"/v": "v"}, environment=given)),
}


@pytest.mark.parametrize("launcher", GIVEN)
@pytest.mark.parametrize("name", ["", "A=B", "A\0B"])
def test_a_name_that_no_variable_has_is_refused(launcher: str, name: str) -> None:
    with pytest.raises(UserError, match=r"NAME: value|letters"):
        GIVEN[launcher]({name: "value"}).spec(Path("run"), 1)


@pytest.mark.parametrize("launcher", GIVEN)
@pytest.mark.parametrize("name", ["RANK", "MASTER_PORT", "PET_NNODES", "LOOMTUNE_PACKED"])
def test_a_name_that_decides_who_meets_whom_is_refused_with_its_cure(launcher: str, name: str) -> None:
    with pytest.raises(UserError, match=f"leave {name} out"):
        GIVEN[launcher]({name: "value"}).spec(Path("run"), 1)


@pytest.mark.parametrize("launcher", ["local", "ray", "ssh", "slurm"])
def test_a_value_that_no_variable_has_is_refused(launcher: str) -> None:
    with pytest.raises(UserError, match="NUL in a value"):
        GIVEN[launcher]({"NAME": "value\0"}).spec(Path("run"), 1)


@pytest.mark.parametrize("launcher", GIVEN)
@pytest.mark.parametrize("name", ["A B", "$(touch executed)", "1A", "A\nB"])
def test_a_name_that_an_engine_would_misread_is_refused(launcher: str, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        GIVEN[launcher]({name: "value"}).spec(Path("run"), 1)


def test_a_folder_that_slurm_would_misread_is_refused(tmp_path: Path) -> None:
    launcher = Slurm(SlurmSettings())
    with pytest.raises(UserError, match=r"run\.dir"):
        launcher.render(launcher.spec(tmp_path / "back\\slash", 1))


@pytest.mark.parametrize(
    "folder", ["/runs/$(touch executed)", "/runs/a b", "/runs/it's", "/runs/a\nb", "runs/a", "/r/../a"]
)
def test_a_folder_elsewhere_that_a_template_might_read_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match=r"run_dir"):
        Kubernetes(KubernetesSettings(image="i", run_dir=folder))
    with pytest.raises(UserError, match=r"run_dir"):
        SkyPilot(SkyPilotSettings(volumes={"/runs": "v"}, run_dir=folder))
