"""How a run's job is put to Slurm: the arguments of sbatch, of srun, and the batch script. Pure."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from loomtune.contracts import JobSpec
from loomtune.errors import UserError
from loomtune_launchers import jobs
from loomtune_launchers.slurm.settings import SlurmSettings

NAMED = ("partition", "account", "qos", "reservation", "constraint")
"""Settings that are options of sbatch by the same name."""

_INSTEAD = {
    "nodes": "nodes N",
    "procs": "ntasks n ntasks-per-node",
    "gpus": "gpus-per-node",
    "cpus": "cpus-per-task c",
    "memory": "mem",
    "time": "time t",
    "partition": "partition p",
    "account": "account A",
    "qos": "qos q",
    "reservation": "reservation",
    "constraint": "constraint C",
    "requeues": "requeue no-requeue",
    "grace": "signal",
    "setup": "wrap",
    "environment": "export",
    "": "parsable output o error e open-mode array a chdir D wait W job-name J",
}
OURS = {name: key for key, names in _INSTEAD.items() for name in names.split()}
"""Options of sbatch that are ours to give, and the setting to use in their place, where there is one."""

_TIMES = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}

EARLY = 60
"""Seconds by which Slurm may send the signal of `--signal` before its time."""


def seconds(time: int | str) -> int:
    """`launcher.time` in seconds; 0 for none. Raises UserError where Slurm would not understand it."""
    said = str(time).strip()
    if isinstance(time, int) or re.fullmatch(r"-?\d+", said):
        found = int(said)  # the command line's numbers are seconds, as everywhere else in loomtune
    else:
        parts = next((match.groupdict() for form in _TIMES if (match := re.fullmatch(form, said))), None)
        found = sum(_SECONDS[unit] * int(number or 0) for unit, number in parts.items()) if parts else -bool(said)
    if found < 0:
        raise UserError.of(f"launcher.time={time} is no time", "set seconds, or hours:minutes:seconds such as 12:00:00")
    return found


def check(settings: SlurmSettings) -> None:
    """Raises UserError for what Slurm, or the shell before it, would misread."""
    for name in ("gpus", "cpus", "requeues", "grace"):
        if getattr(settings, name) < 0:
            raise UserError.of(f"launcher.{name}={getattr(settings, name)} is less than none", f"set launcher.{name}=0")
    for name in (*NAMED, "memory"):
        if not str(getattr(settings, name)).isprintable():
            raise UserError.of(f"launcher.{name} has a line break, or what cannot be seen", "write it on one line")
    limit = seconds(settings.time)
    if limit and limit < settings.grace + 2 * EARLY:
        what = f"launcher.time={settings.time} leaves no time to train: the run hears of it up to "
        what += f"{settings.grace + EARLY} s before the end"
        raise UserError.of(
            what, f"set launcher.time={settings.grace + 2 * EARLY} at least, or a smaller launcher.grace"
        )
    for option in settings.options:
        _check_option(option)
    _check_container(settings)


def _check_option(option: str) -> None:
    name = re.match(r"--([\w-]+)|-(\w)", option)
    if not name or not option.isprintable():
        raise UserError.of(
            f"launcher.options has {option!r}, which is no option", "write each as one text: '--mail-type=END'"
        )
    said = name[1] or name[2]
    if said in OURS:
        cure = f"use launcher.{OURS[said]}" if OURS[said] else "leave it out"
        raise UserError.of(f"launcher.options has {option}, which this launcher says itself", cure)


def _check_container(settings: SlurmSettings) -> None:
    if settings.container not in ("", "pyxis", "apptainer"):
        raise UserError.of(f"launcher.container={settings.container} is not known", "set pyxis or apptainer")
    if settings.container and not settings.image:
        raise UserError.of(f"launcher.container={settings.container} needs an image", "set launcher.image")
    if not settings.container and (settings.image or settings.mounts):
        what = "launcher.image and launcher.mounts are for a container, and there is none"
        raise UserError.of(what, "set launcher.container=pyxis or apptainer, or leave them out")
    for mount in settings.mounts:
        if "," in mount or not mount.isprintable() or not 1 <= mount.count(":") <= 2:
            raise UserError.of(f"launcher.mounts has {mount!r}", "write from:to, without a comma, each a text")


def options(settings: SlurmSettings, spec: JobSpec) -> tuple[str, ...]:
    """The arguments of sbatch that say what a job is given: an element of a list each, so that nothing is quoted."""
    least, most = spec.nodes
    given = [f"--nodes={least}", "--ntasks-per-node=1"]
    if least < most:  # Slurm 22.05: a job that says how many tasks a node has gets the least of them
        given = [f"--nodes={least}-{most}"]
    resources = spec.resources
    if resources.cpus:
        given.append(f"--cpus-per-task={resources.cpus * spec.procs}")
    if resources.gpus:
        given.append(f"--gres=gpu:{resources.gpus}")
    if resources.memory:
        given.append(f"--mem={resources.memory}")
    if spec.seconds:
        given.append(f"--time={-(-spec.seconds // 60)}")
    given += [f"--{name}={value}" for name in NAMED if (value := getattr(settings, name))]
    given.append("--requeue" if spec.requeues else "--no-requeue")
    given += [f"--signal=B:USR1@{spec.grace}", "--open-mode=append", "--export=ALL"]
    return (*given, *settings.options)


def output(folder: Path, pattern: str) -> str:
    """The option that says where the batch script's own words go: in a folder, by a pattern of Slurm's."""
    if "\\" in str(folder):
        what = f"{folder}: Slurm takes a backslash in a path for its own"
        raise UserError.of(what, "set run.dir to a path without one")
    return f"--output={str(folder).replace('%', '%%')}/{pattern}"


def label(name: str) -> str:
    """A job's name as `squeue` can show it on its line."""
    return re.sub(r"[^\w.@=+-]+", "_", name)[:100] or "loomtune"


def script(settings: SlurmSettings, *what: str) -> str:
    """The batch script: the user's own lines, then the one process that starts the nodes and decides what follows.

    what: its arguments, paths of ours.
    """
    command = shlex.join([sys.executable, "-m", "loomtune_launchers.slurm.job", *what])
    return "\n".join(["#!/bin/bash", *settings.setup, f"exec {command}", ""])


def on_nodes(settings: SlurmSettings, spec: JobSpec, folder: Path) -> tuple[str, ...]:
    """The command that starts one process on every node of the job, but for where they meet and which attempt it is.

    folder: where the job was submitted, and runs. Steps take all of the job's cores, whatever srun would bind them to.
    A node that has left does not end the others: rank 0 may still be writing what they did together.
    """
    srun = ("srun", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", "--export=ALL")
    python = settings.python or ("python3" if settings.container else sys.executable)
    node = (python, "-m", "loomtune_launchers.node", str(spec.run / jobs.FILE))
    return (*srun, *_contained(settings, spec, folder), *node)


def _contained(settings: SlurmSettings, spec: JobSpec, folder: Path) -> tuple[str, ...]:
    if not settings.container:
        return ()
    seen = list(dict.fromkeys(map(str, (spec.run, folder))))
    if odd := [path for path in seen if set(",:") & set(path)]:
        what = f"{odd[0]} has a comma or a colon, which a container's mounts cannot say"
        raise UserError.of(what, "set run.dir to another path, and start in another folder")
    mounts = ",".join([*(f"{path}:{path}" for path in seen), *settings.mounts])
    if settings.container == "pyxis":
        image = (f"--container-image={settings.image}", f"--container-mounts={mounts}")
        return (*image, f"--container-workdir={folder}")
    cards = ("--nv",) if spec.resources.gpus or any("gpu" in option for option in settings.options) else ()
    return ("apptainer", "exec", *cards, f"--bind={mounts}", f"--pwd={folder}", settings.image)
