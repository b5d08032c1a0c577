"""What launchers share whose job sees nothing of this machine: what it is told, and how their tools are called."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from loomtune.contracts import JobSpec, JobStatus, Submission
from loomtune.errors import UserError
from loomtune_launchers import jobs, there, torchrun
from loomtune_launchers.settings import GroupSettings

MODULE = "loomtune.train"
"""It composes, checks and tokenises on the job's own rank 0."""

PORT = 29500
"""Where the first node is met; a pod, or a cloud's machine, has all ports to itself."""

LONGEST_NAME = 40
"""Of a job: its nodes' names are made from it and must stay within DNS's 63 characters."""


def arguments(typed: Sequence[str], folder: str) -> tuple[str, ...]:
    """What the job composes from: what was typed, without what concerns this side. folder: the run's, there.

    Raises UserError where a value refers to what is left out.
    """
    kept = [text for text in typed if _key(text) not in ("launcher", "run.dir")]
    for text in kept:
        if "${launcher" in text:
            what = f"'{text}' refers to the launcher's settings, which the job does not see"
            raise UserError.of(what, f"write the value itself: {text.partition('=')[0]}=<value>")
    return (*kept, "launcher=local", f"run.dir='{folder}'")


def _key(text: str) -> str:
    """The key of an override; of the launcher's, the axis alone."""
    key = text.lstrip("+~").partition("=")[0]
    return "launcher" if key.partition(".")[0] == "launcher" else key


def job_name(asked: str, run: Path) -> str:
    """`launcher.job`, or a name from the run's folder. Raises UserError where what was asked for is no DNS label."""
    if asked:
        if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", asked):
            what = f"launcher.job={asked} is no name that DNS takes"
            raise UserError.of(what, f"set launcher.job to at most {LONGEST_NAME} of a-z, 0-9 and -, a letter first")
        return asked
    plain = re.sub("[^a-z0-9]+", "-", run.name.lower()).strip("-")
    return f"loomtune-{plain}"[:LONGEST_NAME].rstrip("-")


def run_dir(asked: str, kept: Sequence[str], name: str) -> str:
    """The run's folder there: `launcher.run_dir`, or one in the first of the paths whose files are kept.

    Empty where there is neither. Raises UserError where it is named but not kept.
    """
    folder = asked or (f"{kept[0].rstrip('/')}/runs/{name}" if kept else "")
    if folder and (not re.fullmatch(r"/[\w./@+-]+", folder) or ".." in PurePosixPath(folder).parts):
        raise UserError.of(f"{folder} cannot be the run's folder", "set launcher.run_dir to a plain absolute path")
    if kept and not any(PurePosixPath(folder).is_relative_to(path) for path in kept):
        raise UserError.of(f"launcher.run_dir={folder} is not kept", f"name a folder in {' or '.join(kept)}")
    return folder


def environment(settings: GroupSettings, cores: int = 0) -> dict[str, str]:
    """Of every process there. cores: of each, 0 where they are not known."""
    shared = settings.threads or cores
    return {
        **torchrun.REPLACEABLE,
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
        **({"OMP_NUM_THREADS": str(shared)} if shared else {}),
        **settings.environment,
    }


def command(spec: JobSpec, folder: str, python: str, meeting: str) -> tuple[str, ...]:
    """What each node runs, where `PET_*` says which it is.

    meeting: HOST:PORT of the first, for restarts; empty: `PET_*` says that too. Without restarts the nodes' ranks are
    given; with them they are not, because torch 2.13's static rendezvous does not meet a second time.
    """
    group = ["--tee=3", f"--shutdown-timeout={spec.grace}"]
    if spec.restarts:
        group += ["--rdzv-backend=c10d", f"--rdzv-id={spec.name}", f"--max-restarts={spec.restarts}"]
        group += [f"--rdzv-endpoint={meeting}"] if meeting else []
    # torchrun fills in templates in what ranks are given: `$$` and `${local_rank}`.
    literal = (word.replace("$", "$$") for word in spec.arguments)
    return (python, "-m", there.__name__, folder, *group, "-m", spec.module, *literal)


def write(spec: JobSpec, submission: Submission) -> None:
    """Puts the submission's files in their place; takes away what a cancelled run left."""
    spec.run.mkdir(parents=True, exist_ok=True)
    (spec.run / jobs.CANCELLED).unlink(missing_ok=True)
    for name, text in submission.files.items():
        (spec.run / name).write_text(text)


def show(words: Sequence[str]) -> None:
    """Runs a tool that takes minutes, which says on the terminal what it does. Raises UserError where it fails."""
    _find(words[0])
    if subprocess.run(words, stdout=sys.stderr.fileno(), check=False).returncode:
        raise UserError.of(f"`{' '.join(words[:4])} ...` failed", f"mend what {words[0]} says above")


def call(words: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a tool to its end. Raises UserError where it is not there or, with `check`, fails: what it said."""
    _find(words[0])
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if check and done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        what = f"`{' '.join(words[:4])} ...` failed: {' '.join(said[-3:])}"
        raise UserError.of(what, f"mend what {words[0]} says")
    return done


def lines(words: Sequence[str]) -> Iterator[str]:
    """What a tool prints, as it comes, without colours; it ends with whoever reads."""
    _find(words[0])
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip("\n"))
        finally:
            child.terminate()


def _find(tool: str) -> None:
    if shutil.which(tool) is None:
        cure = f"install {tool} and log in, or hand what --dry-run shows to it elsewhere"
        raise UserError.of(f"there is no `{tool}` on this machine", cure)


def result(said: Iterable[str]) -> dict[str, Any] | None:
    """The result that the first node printed last; None where it is not among the lines."""
    found = [text.partition(there.MARK)[2] for text in said if there.MARK in text]
    plain: dict[str, Any] | None = json.loads(found[-1]) if found else None
    return plain


def standing(found: dict[str, Any] | None, otherwise: str, detail: str) -> JobStatus:
    """How an ended job stands: by its result where it left one, else as the engine says."""
    if found is None:
        return JobStatus(otherwise, detail)
    return JobStatus(found["status"], found["error"] or f"step {found['step']}")
