"""The settings that belong to no plugin: the root of the configuration, with their types and defaults."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, Union

from loomtune.errors import UserError


def option(
    default: Any, help: str, *, least: float | None = None, among: tuple[str, ...] = (), how: bool = False
) -> Any:
    """A dataclass field with its explanation, which `loomtune plugins NAME` and `--help` show.

    least: the smallest value, where there is one. among: all values, where they are few. A root setting that is none of
    them is refused before the run; a plugin's says so itself. how: whether a plugin's setting says how something is
    computed, never what: memory, time and places, no part of the maths, so that a run may go on with another value.
    """
    metadata = {"help": help, "least": least, "among": among, "how": how}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def from_environment(name: str, unless: float, least: float, most: float = math.inf) -> float:
    """The number that a variable of the environment holds. Raises UserError where it holds something else."""
    said = os.environ.get(name) or str(unless)
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if not (least <= number <= most and math.isfinite(number)):
        up_to = f" to {most:g}" if math.isfinite(most) else ""
        raise UserError.of(f"{name}={said} is no number from {least:g}{up_to}", f"leave it unset, or say {unless:g}")
    return number


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of plain settings; an empty mapping is one."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def type_name(field: Field[Any]) -> str:
    """A setting's type as its author wrote it, for messages."""
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


@dataclass
class BatchSettings:
    """What one optimizer step is made of."""

    size: int = option(8, "sequences per optimizer step, over all ranks: part of the maths", least=1)
    sampler: str = option(
        "shuffled",
        "which rows make a step: `shuffled`, `sequential`, or `packed`: as many as fill `size` rows of `max_length`",
        among=("shuffled", "sequential", "packed"),
    )
    micro: Union[int, str] = option("auto", "rows a rank computes at once: memory and time only; `auto` finds it")  # noqa: UP007
    share: str = option(
        "auto", "whether answers to one prompt share its computation: time only", among=("auto", "always", "never")
    )


@dataclass
class CheckpointSettings:
    """When progress is committed."""

    every: int = option(0, "optimizer steps between checkpoints; 0: only at the end", least=0)
    keep: int = option(2, "how many checkpoints stay beside the best one", least=1)
    background: bool = option(True, "write in a thread while training goes on")


@dataclass
class EvaluateSettings:
    """When the evaluators run, and what their metrics decide."""

    every: int = option(0, "optimizer steps between evaluations; 0: only at the end", least=0)
    before: bool = option(False, "also measure the model before training; its metrics end in `_before`")
    best: str = option("", "metric by which the best checkpoint is kept; empty: none is")
    mode: str = option("min", "whether `min` or `max` of it is best", among=("min", "max"))
    patience: int = option(0, "stop after so many evaluations without a better value; 0: never", least=0)
    rows: int = option(0, "at most so many rows of a split; 0: all", least=0)


@dataclass
class RunSettings:
    """Where a run lives."""

    dir: str = option("", "folder of the run; default: runs/<time>-<hash>")
    name: str = option("", "a name for trackers; default: the folder's")


@dataclass
class ProfileSettings:
    """What is recorded of single steps."""

    steps: str = option("", "a step, or FIRST:LAST, of which every rank leaves a trace in RUN/profile; empty: none")


@dataclass
class Link:
    """How accelerators reach each other. Each way counts for itself: makers often print the sum of both."""

    gb_per_second: float = option(0.0, "GB/s that one accelerator can send while it receives as many", least=0)
    microseconds: float = option(0.0, "from the start of a message to its arrival", least=0)


@dataclass
class Hardware:
    """What a run is planned for: one kind of node. The shipped figures are `conf/loomtune_conf/hardware/`.

    Decimal units as makers print them (1 GB = 10^9 bytes, 1 TFLOP/s = 10^12 operations), but for memory, in GiB.
    Empty, as by default: nothing is known, so nothing is refused.
    """

    kind: str = option(
        "", "of the accelerators: `cuda`, `rocm`, or `cpu`; empty: unknown", among=("", "cuda", "rocm", "cpu")
    )
    title: str = option("", "what its maker calls it")
    memory_gib: float = option(0.0, "that a process can allocate on an accelerator; of a CPU: its share", least=0)
    memory_gb_per_second: float = option(0.0, "that this memory can be read or written at", least=0)
    tflops: dict[str, float] = option({}, "dense peak by type of the factors: bf16, fp32, ...; without sparsity")
    per_node: int = option(1, "accelerators in a node", least=1)
    inside: Link = field(default_factory=Link)
    between: Link = field(default_factory=Link)
    host: Link = field(default_factory=Link)
    host_gib: float = option(0.0, "memory of a node beside its accelerators'; 0: unknown", least=0)
    disk_gb_per_second: float = option(0.0, "that a node writes to the shared disk at; 0: unknown", least=0)
    watts: float = option(0.0, "that one accelerator takes under load, with its share of the node", least=0)
    price: float = option(0.0, "of one accelerator's hour, in USD; 0: unknown", least=0)
    refuse: bool = option(True, "refuse, before it is launched, a run that will not fit; false: say so and go on")
    sources: dict[str, str] = option({}, "where each figure is from")

    @property
    def known(self) -> bool:
        """Whether anything can be planned for."""
        return bool(self.kind)


@dataclass
class Settings:
    """The root. The axes' settings stand beside these keys, under the axis' name."""

    run: RunSettings = field(default_factory=RunSettings)
    steps: int = option(0, "optimizer steps; 0: as many as `epochs` needs", least=0)
    epochs: float = option(1.0, "passes over the training rows, where `steps` is 0")
    stop_after: int = option(0, "end cleanly after this step, without changing the schedule; 0: at the last", least=0)
    seed: int = option(0, "decides the order of rows, drawn weights and dropout")
    max_length: int = option(
        0, "longest sample in tokens; what is longer is cut, counted and reported; 0: the model's context", least=0
    )
    packing: bool = option(
        False, "lay several samples of a step into one row, of at most `max_length` tokens: memory and time only"
    )
    precision: str = option(
        "fp32", "type of computation, `fp32` or `bf16`; trained weights are kept in fp32", among=("fp32", "bf16")
    )
    batch: BatchSettings = field(default_factory=BatchSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    dry_step: str = option(
        "auto",
        "compute, before the first step, one at the longest batch and drop it: memory that lacks is missed at once; "
        "`auto`: on accelerators",
        among=("auto", "always", "never"),
    )
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    hardware: Hardware = field(default_factory=Hardware)
    roles: dict[str, Any] = option(
        {}, "models beside the policy: roles.teacher.model.path=, or any setting of model; others it has from there"
    )


ROOT_KEYS = tuple(entry.name for entry in fields(Settings))
"""Top-level keys that are no axis."""

NOT_PART_OF_THE_MATHS = (
    "launcher",
    "sharding",
    "tracker",
    "guard",
    "run",
    "checkpoint",
    "stop_after",
    "batch.micro",
    "batch.share",
    "packing",
    "exporter",
    "dry_step",
    "profile",
    "hardware",
)
"""Keys that the plan's hash leaves out, beside what plugins say is how alone: a run may go on with other values."""
