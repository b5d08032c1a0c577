"""Every hook of loomtune, in the order in which a run meets it: the table of contents of the framework.

A plugin is any module or object with functions marked `@loomtune.hookimpl` that bear these names. Offers are data
(gathered once, looked up by name); events are told to every plugin, on every rank, in the same order. An event hook
must not steer the run or call a collective: what steers is a guard, and what answers a question is `firstresult`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pluggy import HookspecMarker

if TYPE_CHECKING:
    from loomtune import contracts as c
    from loomtune.offers import Command, Offer
    from loomtune.plan import Estimate, Finding, Plan
    from loomtune.run import Run

hookspec = HookspecMarker("loomtune")


# ---------------------------------------------------------------------------------------------------------------------
# Offers: what can be chosen. Called once, when the catalogue is built, in the launching process and on every rank.
# ---------------------------------------------------------------------------------------------------------------------


@hookspec
def config_sources() -> Sequence[str]:  # type: ignore[empty-body]
    """Gives folders of Hydra configs, such as `pkg://acme.conf`, that are searched after loomtune's own."""


@hookspec
def commands() -> Sequence[Command]:  # type: ignore[empty-body]
    """Gives commands of the command line: what a run need not know, and a user asks of it or of what is installed."""


@hookspec
def models() -> Sequence[Offer[c.Model]]:  # type: ignore[empty-body]
    """Offers ways to come by a model: its skeleton, its weights and its tokenizer. Key: `model=`."""


@hookspec
def datas() -> Sequence[Offer[c.Data]]:  # type: ignore[empty-body]
    """Offers sources of rows. Key: `data=`."""


@hookspec
def objectives() -> Sequence[Offer[c.Objective]]:  # type: ignore[empty-body]
    """Offers what is learned from rows: how they become samples, and the loss. Key: `objective=`."""


@hookspec
def adapters() -> Sequence[Offer[c.Adapter]]:  # type: ignore[empty-body]
    """Offers which parameters are trained, and what is added to the model for it. Key: `adapter=`."""


@hookspec
def shardings() -> Sequence[Offer[c.Sharding]]:  # type: ignore[empty-body]
    """Offers how parameters, gradients and optimizer state are laid out over processes. Key: `sharding=`."""


@hookspec
def optimizers() -> Sequence[Offer[c.Optimizer]]:  # type: ignore[empty-body]
    """Offers optimizers, which declare the state that they keep. Key: `optimizer=`."""


@hookspec
def schedules() -> Sequence[Offer[c.Schedule]]:  # type: ignore[empty-body]
    """Offers learning-rate schedules, pure functions of the optimizer step. Key: `schedule=`."""


@hookspec
def launchers() -> Sequence[Offer[c.Launcher]]:  # type: ignore[empty-body]
    """Offers ways to start the processes of a run. Key: `launcher=`."""


@hookspec
def rollouts() -> Sequence[Offer[c.Rollout]]:  # type: ignore[empty-body]
    """Offers engines that generate completions during training. Key: `rollout=`."""


@hookspec
def kernels() -> Sequence[Offer[c.Kernel]]:  # type: ignore[empty-body]
    """Offers attention back-ends, which translate segments into what a model understands. Key: `kernel=`."""


@hookspec
def losses() -> Sequence[Offer[c.Loss]]:  # type: ignore[empty-body]
    """Offers variants of loss for the objectives that take them. Key: `loss=`."""


@hookspec
def rewards() -> Sequence[Offer[c.Reward]]:  # type: ignore[empty-body]
    """Offers scores of completions for reinforcement learning. Key: `reward=`."""


@hookspec
def trackers() -> Sequence[Offer[c.Tracker]]:  # type: ignore[empty-body]
    """Offers observers that record a run. Key: `tracker=`."""


@hookspec
def evaluators() -> Sequence[Offer[c.Evaluator]]:  # type: ignore[empty-body]
    """Offers measurements of a model. Key: `evaluator=`."""


@hookspec
def exporters() -> Sequence[Offer[c.Exporter]]:  # type: ignore[empty-body]
    """Offers forms in which a trained model leaves. Key: `exporter=`."""


@hookspec
def guards() -> Sequence[Offer[c.Guard]]:  # type: ignore[empty-body]
    """Offers judges of each step, which may skip it, roll back or stop the run. Key: `guard=`."""


@hookspec
def stages() -> Sequence[Offer[c.Stage]]:  # type: ignore[empty-body]
    """Offers steps of data preparation. Key: `stage=`."""


# ---------------------------------------------------------------------------------------------------------------------
# Before the run: in the launching process, without accelerators and without torch.
# ---------------------------------------------------------------------------------------------------------------------


@hookspec
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:  # type: ignore[empty-body]
    """Says what is wrong or doubtful about a plan, before any process of the run exists.

    plan: the checked composition; `plan.processes` is the world size that will be asked for, 0 where unknown.
    provided: each trait that the plan's choices provide, to the choice that does, such as `adapter=lora`.
    Returns findings: faults refuse the run, warnings are shown. Every cell of `loomtune matrix` asks too: be quick.
    """


@hookspec
def estimate(plan: Plan) -> Sequence[Estimate]:  # type: ignore[empty-body]
    """Foretells an amount (bytes, seconds, tokens) of the run, with the reasoning, for `loomtune plan`."""


@hookspec
def foresee(plan: Plan, folder: Path) -> Sequence[Finding]:  # type: ignore[empty-body]
    """Says, once, whether a run that is about to be launched can go well; it may take its time, and files of its own.

    Asked by `loomtune train`, and by rank 0 where ranks are started by hand, before anything of the run is made; after
    every check, so the plan is sound. Returns findings, as `preflight`: faults refuse the run.
    plan: with the world size that will be asked for. folder: of the run, which may not be there yet, to leave files in.
    """


# ---------------------------------------------------------------------------------------------------------------------
# During the run: events, on a manager made for this run, on every rank in the same order.
# ---------------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def resume_point(run: Run) -> Path | None:
    """Answers from which checkpoint folder to go on; the first plugin that knows decides. None: the latest valid.

    It may lie anywhere, but has to be of this run: one whose manifest names another run's hash is refused.
    """


@hookspec
def run_started(run: Run) -> None:
    """Tells that the world exists and the plan is loaded, before any model is built."""


@hookspec
def model_ready(run: Run) -> None:
    """Tells that all roles are built and, on a resume, loaded."""


@hookspec
def checkpoint_loaded(run: Run, path: Path, step: int) -> None:
    """Tells that the run goes on from a checkpoint. step: optimizer steps done."""


@hookspec
def step_started(run: Run, step: int) -> None:
    """Tells that an optimizer step begins. step: counted from 1."""


@hookspec
def rollout_finished(run: Run, step: int, samples: Sequence[Mapping[str, object]]) -> None:
    """Tells what an online objective generated, once a batch, before the step that is the first to learn from it.

    samples: all of them, alike on every rank: `prompt`, `completion`, and what the objective says of each.
    """


@hookspec
def step_finished(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Tells that an optimizer step is over. metrics: global means and sums, equal on every rank."""


@hookspec
def evaluated(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Tells the results of the evaluators after a step; step 0 is the base model before training."""


@hookspec
def checkpoint_saved(run: Run, path: Path, step: int) -> None:
    """Tells that a checkpoint is committed: from now on a kill loses nothing before it."""


@hookspec
def exported(folder: Path, path: Path) -> None:
    """Tells that a model left in a servable form: at a run's end, and of `loomtune export`, which no tracker hears.

    folder: the run's. path: the folder that the model is in.
    """


@hookspec(firstresult=True)
def fault_verdict(run: Run, error: BaseException) -> str | None:
    """Answers what kind of failure an exception is (`user`, `hardware`, `data`, ...); the first that knows decides."""


@hookspec
def run_failed(run: Run, error: BaseException) -> None:
    """Tells that the run ends by an error. `run_finished` still follows."""


@hookspec
def run_finished(run: Run, status: str) -> None:
    """Tells that the run is over: completed, stopped, failed or preempted. Always the last event."""
