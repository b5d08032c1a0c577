"""An offer says what a plugin can build, as plain data; the axes say where offers belong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

T = TypeVar("T")


class Arity(StrEnum):
    """How many offers of an axis a run may choose."""

    ONE = "exactly one"
    OPTIONAL = "none or one"
    MANY = "any number"


class Trait(StrEnum):
    """The vocabulary of what an offer provides or needs. A third party prefixes its own: `acme:x`.

    A chosen offer's need is met when any other chosen offer of the run provides it. `docs/plugins.md` has the table.
    """

    COMPLETIONS = "completions"  # rows with a prompt and a completion, chat messages, or plain text
    TEXTS = "texts"  # rows of plain text
    PAIRS = "pairs"  # rows with a chosen and a rejected answer
    LABELS = "labels"  # rows with an answer and whether it is wanted
    PROMPTS = "prompts"  # rows whose prompt alone is used
    DATABASES = "databases"  # rows that carry an SQL database to execute queries on
    MANY_PROCESSES = "many_processes"  # the sharding strategy runs on more than one process
    GENERATION = "generation"  # completions can be generated in the middle of training
    ADAPTER_OFF = "adapter_off"  # the adapter can be switched off, which makes a frozen reference for free
    WRAPPED_LINEARS = "wrapped_linears"  # the adapter puts modules of its own around linear layers or behind them
    VIRTUAL_TOKENS = "virtual_tokens"  # the adapter puts something of its own before each row
    UNMERGEABLE = "unmergeable"  # what the adapter learns cannot be put into the base's weights
    WHOLE_MODEL = "whole_model"  # the adapter trains the base itself and adds nothing
    SHAPED_UPDATES = "shaped_updates"  # the optimizer's step must see each parameter in its own shape
    METRICS_FILE = "metrics_file"  # metrics.jsonl is written, from which others read
    ISOLATED_SEGMENTS = "isolated_segments"  # attention keeps the segments of a row apart


@dataclass(frozen=True, slots=True)
class Axis:
    """One kind of thing that plugins offer: its Hydra group and key, its hook, and the contract that offers meet."""

    name: str
    hook: str
    arity: Arity
    contract: str


AXES: tuple[Axis, ...] = (
    Axis("model", "models", Arity.ONE, "loomtune.contracts.model:Model"),
    Axis("data", "datas", Arity.ONE, "loomtune.contracts.data:Data"),
    Axis("objective", "objectives", Arity.ONE, "loomtune.contracts.objective:Objective"),
    Axis("adapter", "adapters", Arity.ONE, "loomtune.contracts.adapter:Adapter"),
    Axis("sharding", "shardings", Arity.ONE, "loomtune.contracts.sharding:Sharding"),
    Axis("optimizer", "optimizers", Arity.ONE, "loomtune.contracts.optimizer:Optimizer"),
    Axis("schedule", "schedules", Arity.ONE, "loomtune.contracts.schedule:Schedule"),
    Axis("launcher", "launchers", Arity.ONE, "loomtune.contracts.launcher:Launcher"),
    Axis("rollout", "rollouts", Arity.OPTIONAL, "loomtune.contracts.rollout:Rollout"),
    Axis("kernel", "kernels", Arity.MANY, "loomtune.contracts.kernel:Kernel"),
    Axis("loss", "losses", Arity.MANY, "loomtune.contracts.loss:Loss"),
    Axis("reward", "rewards", Arity.MANY, "loomtune.contracts.reward:Reward"),
    Axis("tracker", "trackers", Arity.MANY, "loomtune.contracts.tracker:Tracker"),
    Axis("evaluator", "evaluators", Arity.MANY, "loomtune.contracts.evaluator:Evaluator"),
    Axis("exporter", "exporters", Arity.MANY, "loomtune.contracts.exporter:Exporter"),
    Axis("guard", "guards", Arity.MANY, "loomtune.contracts.guard:Guard"),
    Axis("stage", "stages", Arity.MANY, "loomtune.contracts.stage:Stage"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer(Generic[T]):
    """What a plugin can build under a name.

    name: what `sharding=fsdp` says.
    build: `package.module:Class`, imported only when chosen. It is called with the settings as its one argument.
    schema: dataclass of its settings, from a module that imports nothing heavy; `metadata["help"]` explains each.
    summary: one line for `loomtune plugins`.
    provides, needs: traits, from which the rules across axes are computed.
    aliases: what other trainers call a setting to its name here, or `loss.NAME.key`; empty: it says nothing of a batch.
        The conformance kit takes them (`loss_of`), a run does not.
    brings: axis of many to the choices that are made there where nobody makes one.
    excludes: trait to the reason why this does not go with a choice that provides it.
    variants: name to settings of its own axis, as they are typed (`sharding.stage=3`), that have a row of their own in
        the capability matrix, because what goes with them differs.
    extra: the optional dependency group that brings its libraries, where they are not among the plain ones.
    """

    name: str
    build: str
    schema: type
    summary: str
    provides: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)
    brings: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    excludes: Mapping[str, str] = field(default_factory=dict, hash=False)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    extra: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A command beside loomtune's own.

    name: what is typed after `loomtune`.
    run: `package.module:function`, imported only when typed. It is called with the words that follow, which it reads by
        a parser of its own, and gives the exit code.
    summary: one line for `loomtune --help`.
    """

    name: str
    run: str
    summary: str


def axis(name: str) -> Axis:
    """The axis of that name. Raises KeyError where there is none."""
    return _BY_NAME[name]


_BY_NAME = {entry.name: entry for entry in AXES}
