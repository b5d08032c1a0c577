"""The same run from Python: compose, train, resume, evaluate, export. The command line is a thin layer over this."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loomtune import inputs, role_models, samplers, streaming
from loomtune import plan as plans
from loomtune.catalogue import Catalogue, installed
from loomtune.compose import compose as compose_settings
from loomtune.compose import quoted
from loomtune.contracts import Data, Evaluator, Launcher, Objective, Reward, Tracker
from loomtune.errors import Fault, RunFailed, UserError
from loomtune.offers import AXES, Trait
from loomtune.plan import Finding, Plan
from loomtune.settings import NOT_PART_OF_THE_MATHS, ROOT_KEYS, leaves
from loomtune.tokenising import tokenise
from loomtune.tokenising import warn as warn  # noqa: PLC0414 - commands warn by it too

ALONE = ("sharding=single", "launcher=local", "launcher.procs=1")
"""How a run's model is opened to be measured or talked to, however it was trained."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, or `submitted`. status: completed, stopped, failed or preempted.

    metrics: the last, evaluations included.
    """

    folder: Path
    status: str
    step: int
    metrics: dict[str, Any]
    error: str | None

    @classmethod
    def of(cls, folder: Path) -> Result:
        """What `result.json` says."""
        return cls(folder, **json.loads((folder / "result.json").read_text()))


def compose(overrides: Sequence[str] = (), config_dirs: Sequence[str] = (), processes: int = 0) -> Plan:
    """A checked plan. processes: a world size that is already given; 0: as the launcher says.

    Raises UserError naming everything that is wrong.
    """
    catalogue = installed()
    plan = compose_settings(overrides, config_dirs)
    many = any(Trait.MANY_PROCESSES in entry.offer.provides for entry in plan.entries(catalogue))
    launcher: Launcher = plan.build(catalogue, "launcher")
    return replace(plan, processes=processes or launcher.processes(many))


def check(plan: Plan, *, simulated: bool = False) -> list[Finding]:
    """Warnings about a plan. Raises UserError of every fault that can be found without starting a process.

    simulated: the plan is for a world elsewhere, so no file and no device of this machine is asked about;
        whether the model can be laid out so is, where its config is at hand.
    """
    catalogue = installed()
    found = plans.findings(plan, catalogue)
    if any(finding.extra for finding in found):
        plans.refuse(found)  # nothing more can be asked of what cannot be imported
    faults: list[Fault] = []
    tried = partial(_tried, faults)
    warnings = tried(plans.refuse, found)
    parts = {axis.name: tried(plan.build, catalogue, axis.name) for axis in AXES}
    if (sharding := parts["sharding"]) is not None:
        tried(lambda: sharding.check(plan.training(plan.processes)))
    if (objective := parts["objective"]) is not None:
        if None not in (parts["loss"], parts["reward"]):
            tried(objective.use, parts["loss"], parts["reward"])
        tried(samplers.suits, plan.root, objective)
        faults += _unheard(objective, parts["reward"] or {}, parts["evaluator"] or {})
        tried(role_models.check, plan, objective)
    others = tried(role_models.models, plan, catalogue) or {}
    for part in () if simulated else (parts["model"], parts["data"], *others.values()):
        if part is not None:
            tried(part.check)
    if not faults and (not simulated or tried(parts["model"].at_hand)):
        for one in (parts["model"], *others.values()):
            tried(sharding.suits, one)
        tried(parts["adapter"].suits, parts["model"])
    if not faults and not simulated:
        tried(objective.suits, others)
        for looking in (*parts["evaluator"].values(), *parts["reward"].values()):
            tried(looking.check, parts["data"])
    if (data := parts["data"]) is not None and data.window and None not in (objective, parts["evaluator"]):
        faults += streaming.faults(plan.root, objective, parts["evaluator"])
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return list(warnings)


def _unheard(objective: Objective, rewards: Mapping[str, Reward], evaluators: Mapping[str, Evaluator]) -> list[Fault]:
    """Rewards that nobody would ask, and those whose networks nobody would build."""
    if objective.takes_rewards() or not rewards:
        return []
    if not any(evaluator.scores for evaluator in evaluators.values()):
        what = f"the objective takes no reward, but {', '.join(rewards)} is chosen"
        return [Fault(what, "set reward=[], or choose an objective that takes one; evaluator=[reward] measures by it")]
    what = "has a network of its own, which only an objective that takes rewards brings"
    return [Fault(f"reward={name} {what}", "leave it out") for name, reward in rewards.items() if reward.roles()]


def _tried(faults: list[Fault], work: Callable[..., Any], *arguments: Any) -> Any:
    """What the work gives; None where it raises UserError, whose faults are gathered."""
    try:
        return work(*arguments)
    except UserError as error:
        faults += error.faults
        return None


def prepare(plan: Plan) -> Path:
    """The run's folder with everything that its ranks need: the frozen plan and the tokenised samples."""
    catalogue = installed()
    folder = _folder(plan)
    plan = _same_run(folder, plan, catalogue)
    began = inputs.fingerprints(plan, catalogue)
    data: Data = plan.build(catalogue, "data")
    if data.window:  # what a place means depends on the files; samples that were made as a whole stay what they are
        began["data"] = data.fingerprint()
    inputs.check(folder, began)
    warn(plans.foreseen(plan, folder, catalogue))
    placed = tokenise(plan, catalogue)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(plan.dump())
    (folder / "plugins.json").write_text(json.dumps(dict(plan.versions), indent=1) + "\n")
    (folder / "samples.json").write_text(json.dumps(placed, indent=1) + "\n")
    (folder / inputs.FILE).write_text(json.dumps(began, indent=1) + "\n")
    for said in ("result.json", "stop", "cancelled"):  # of an earlier start
        (folder / said).unlink(missing_ok=True)
    return folder


def _folder(plan: Plan) -> Path:
    return Path(plan.root.run.dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{plan.hash[:8]}").absolute()


def _same_run(folder: Path, plan: Plan, catalogue: Catalogue) -> Plan:
    """The plan as the folder's run began. Raises UserError where the folder holds another run: nothing is written."""
    here = next(place for place in (folder, *folder.parents) if place.exists())
    if not (here.is_dir() and os.access(here, os.W_OK)):
        why = "may not be written to" if here.is_dir() else "is a file"
        raise UserError.of(f"run.dir={folder}: {here} {why}", "name a folder, or a path where one can be made")
    if not (folder / "run.yaml").is_file():
        return plan
    before = Plan.load(folder)
    launcher: Launcher = plan.build(catalogue, "launcher")
    if before.build(catalogue, "launcher").elsewhere != launcher.elsewhere:
        what = f"{folder} is of launcher={before.chosen('launcher')['name']}, whose checkpoints this one does not see"
        raise UserError.of(what, "copy the run's folder to where it is to go on, and name that by run.dir")
    launcher.ready(folder)
    plan = plan.as_begun(before, catalogue)
    if before.hash != plan.hash:
        raise UserError.of(
            f"{folder} holds another run; these settings differ: {_differences(before, plan)}",
            f"choose another run.dir; a run goes on with other values of {', '.join(NOT_PART_OF_THE_MATHS)} only",
        )
    return plan


def _differences(before: Plan, now: Plan) -> str:
    one, other = dict(leaves(before.maths)), dict(leaves(now.maths))
    keys = (key for key in sorted(one | other) if one.get(key) != other.get(key))
    return ", ".join(f"{key} ({one.get(key)} -> {other.get(key)})" for key in keys) or "defaults of this version"


def launch(plan: Plan, folder: Path) -> Result:
    """Starts the run's processes, and waits unless its launcher is detached (status `submitted`).

    Raises RunFailed where they ended without a result.
    """
    launcher: Launcher = plan.build(installed(), "launcher")
    launcher.submit(launcher.spec(folder, plan.processes, plan.overrides))
    if launcher.detached:
        return Result(folder, "submitted", 0, {}, None)
    if (said := launcher.result(folder)) is None:
        raise RunFailed(f"the processes ended without a result; what was committed is in {folder / 'checkpoints'}")
    return Result(folder, **said)


def train(overrides: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> Result:
    """Composes, checks, launches and trains; a `run.dir` that holds the same run goes on from its last checkpoint."""
    return started(compose(overrides, config_dirs))


def started(plan: Plan) -> Result:
    """Checks, prepares and launches a plan. What runs elsewhere is checked and prepared there, by itself."""
    launcher: Launcher = plan.build(installed(), "launcher")
    warn(check(plan, simulated=launcher.elsewhere))
    launcher.spec(Path(plan.root.run.dir or "RUN"), plan.processes, plan.overrides)  # refuses what it cannot start
    return launch(plan, announced(plan) if launcher.elsewhere else prepare(plan))


def announced(plan: Plan) -> Path:
    """The folder that stands here for a run elsewhere: the plan, and its launcher's record, are all that it holds."""
    if plan.config_dirs:
        raise UserError.of("--config-dir names a folder of this machine", "put those configs into a plugin there")
    folder = _folder(plan)
    plan = _same_run(folder, plan, installed())
    warn(plans.foreseen(plan, folder, installed()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(plan.dump())
    return folder


def launched(folder: Path | str) -> Launcher:
    """The launcher that a run was started by, to be asked for its status, its logs, or to end it."""
    launcher: Launcher = Plan.load(Path(folder)).build(installed(), "launcher")
    return launcher


def resume(folder: Path | str, overrides: Sequence[str] = ()) -> Result:
    """Goes on with a run, under other values of the keys that may change (`settings.NOT_PART_OF_THE_MATHS`)."""
    return started(resumed(Path(folder), overrides))


def resumed(folder: Path, overrides: Sequence[str]) -> Plan:
    """The plan of a run that goes on: what was typed at first, then now; `stop_after` is not inherited."""
    before = Plan.load(folder)
    chosen_anew = {text.lstrip("+").partition("=")[0] for text in overrides}
    kept = [text for text in before.overrides if not _superseded(text.lstrip("+").partition("=")[0], chosen_anew)]
    return compose([*kept, *overrides, f"run.dir={quoted(str(folder.absolute()))}"], before.config_dirs)


def _superseded(key: str, chosen_anew: set[str]) -> bool:
    """True where a new choice of an axis, or of the key itself, makes an old override void."""
    axis = key.partition(".")[0]
    return key in {"stop_after", "run.dir", *chosen_anew} or axis in chosen_anew.difference(ROOT_KEYS)


def evaluate(folder: Path | str, overrides: Sequence[str] = (), *, best: bool = False) -> dict[str, float]:
    """Measures a run's latest (or best) checkpoint with its evaluators, on one process, and gives their metrics."""
    from loomtune.session import opened

    plan = resumed(Path(folder), [*ALONE, *overrides])
    with opened(plan, Path(folder), best=best) as run:
        from loomtune.evaluation import evaluate as measure

        return measure(run)


def export(
    folder: Path | str,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    to: str = "huggingface",
    checkpoint: str = "latest",
    check: bool = True,
) -> Path:
    """Writes the model of a run's checkpoint (`latest`, `best` or a step), its adapter merged in, by an exporter.

    overrides: the exporter's settings. check: whether what left is compared with what was trained.
    """
    from loomtune.export import export as leave

    before = Plan.load(Path(folder))
    plan = resumed(Path(folder), [*overrides, f"exporter=[{to}]"]) if overrides else before
    plan = plan.as_begun(before, installed())
    if plan.hash != before.hash:
        what = f"an export of other maths: {_differences(before, plan)}"
        raise UserError.of(what, f"set nothing but exporter.{to}.<setting>")
    return leave(Path(folder), Path(out) if out else None, to, checkpoint, check=check, plan=plan)


def report(folder: Path) -> Path:
    """Has a run's report made anew by the first of its trackers, or else of those there are, that draws one."""
    catalogue, chosen = installed(), Plan.load(folder).choices("tracker")
    for name in dict.fromkeys([*chosen, *catalogue.names("tracker")]):
        tracker: Tracker = catalogue.build("tracker", name, chosen.get(name, {}))
        if path := tracker.redraw(folder):
            return path
    raise UserError.of("no tracker draws a report", "install a plugin whose tracker does")
