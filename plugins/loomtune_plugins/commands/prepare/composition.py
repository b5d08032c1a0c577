"""From the words behind the command to a job, or to everything that is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from loomtune import api, extras
from loomtune.catalogue import Catalogue, installed
from loomtune.compose import quoted
from loomtune.compose.loader import Loader
from loomtune.contracts import Data, DuplicateStage, RowStage, SplitStage, Stage
from loomtune.errors import Fault, UserError
from loomtune.offers import AXES
from loomtune.plan import Plan
from loomtune.settings import ROOT_KEYS
from loomtune_plugins.commands.prepare.job import Job

STAGES = ("clean", "exact", "near", "split")
"""Through which rows pass where no stage is chosen."""

_OWN = ("data", "stage", "seed", "recipe")
_KEYS = {*ROOT_KEYS, *(axis.name for axis in AXES), "recipe"}
_SAVED = ("dataset_dict.json", "state.json")
"""Of these a folder holds one in which Hugging Face `datasets` saved something."""


def composed(words: Sequence[str], licence: str, keep_dropped: bool, config_dirs: Sequence[str] = ()) -> Job:
    """The job of some inputs and settings. Raises UserError naming all that can be seen before rows are read."""
    inputs, typed = _apart(words)
    if faults := [*_without_effect(typed), *_commas(inputs)]:
        raise UserError(*faults)
    plan = api.compose(overrides(inputs, typed, _of_recipe(typed, config_dirs)), config_dirs)
    catalogue = installed()
    if faults := list(_lacking(plan, catalogue)):
        raise UserError(*faults)
    data, stages = _checked(plan, catalogue)
    if faults := list(_inert(typed, data, stages)):
        raise UserError(*faults)
    settings = {name: dict(node) for name, node in plan.choices("stage").items()}
    return Job(
        data=dict(plan.chosen("data")),
        stages=settings,
        seed=plan.root.seed,
        licence=licence,
        keep_dropped=keep_dropped,
        fingerprint=data.fingerprint(),
        inputs=[
            {"split": split, "name": name, "digest": digest}
            for split in data.splits()
            for name, digest in data.inputs(split).items()
        ],
        shown=[_shown(name, settings[name], stage) for name, stage in stages.items()],
        versions=dict(sorted(pair for stage in stages.values() for pair in stage.versions().items())),
    )


def _of_recipe(typed: Sequence[str], config_dirs: Sequence[str]) -> set[str]:
    """What recipes choose or set. Raises UserError where they set what only a run could heed."""
    names = [word for word in typed if word.startswith("recipe=")]
    loader = Loader(installed(), [str(Path(folder).expanduser().absolute()) for folder in config_dirs])
    if loader.faults or not names or names[-1].partition("=")[2] not in loader.options("recipe"):
        return set()  # composing says what is wrong
    keys, others = set[str](), set[str]()
    for part in loader.parts(names):
        if part.label.startswith("recipe="):
            others |= {*map(str, part.config), *part.chooses} - {*_OWN, "defaults"}
            keys |= set(part.chooses)
            keys |= {"data.path"} if (part.config.get("data") or {}).get("path") else set()
    if others:
        what = f"'{names[-1]}' sets {', '.join(sorted(others))}, and preparing trains nothing"
        raise UserError.of(what, "let a recipe of its own set data, stage and seed alone")
    return keys


def overrides(inputs: Sequence[str], typed: Sequence[str], recipe: Set[str] = frozenset()) -> list[str]:
    """What is composed: what was typed, and beside it the inputs and what is chosen where nothing is.

    recipe: what a recipe has chosen already.
    """
    keys = {word.partition("=")[0] for word in typed} | recipe
    made = list(typed)
    if "data" not in keys:
        if not inputs and "data.path" not in keys:
            raise UserError.of("there is nothing to prepare", "name files, or data=<name> with its settings")
        saved = [name for name in inputs if any((Path(name) / file).is_file() for file in _SAVED)]
        if saved and len(saved) < len(inputs):
            other = next(name for name in inputs if name not in saved)
            what = f"{saved[0]} is a folder of datasets, and {other} is not"
            raise UserError.of(what, "prepare one after the other, or all of one kind")
        made.append("data=datasets" if saved else "data=files")
    if inputs:
        made.append(f"data.path={quoted(','.join(inputs))}")
    if "stage" not in keys:
        made.append(f"stage=[{','.join(STAGES)}]")
    return made


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(inputs, settings). A word with `=` is a setting where what stands before begins with a key's name."""
    inputs, typed = list[str](), list[str]()
    for word in words:
        root = re.split(r"[.=@/]", word.lstrip("+~"), maxsplit=1)[0]
        is_setting = "=" in word and (root in _KEYS or not Path(word).exists())
        (typed if is_setting else inputs).append(word)
    return inputs, typed


def _without_effect(typed: Sequence[str]) -> Iterator[Fault]:
    for word in typed:
        root = re.split(r"[.=@/]", word.lstrip("+~"), maxsplit=1)[0]
        if root in _KEYS and root not in _OWN:
            known = ", ".join(_OWN)
            yield Fault(
                f"'{word}' would be without effect: preparing trains nothing", f"leave it out; it takes {known}"
            )


def _inert(typed: Sequence[str], data: Data, stages: Mapping[str, Stage]) -> Iterator[Fault]:
    """What was typed and would do nothing here: a seed where nothing is drawn, a share of a split that is given."""
    drawing = [name for name, stage in stages.items() if isinstance(stage, SplitStage)]
    given = [split for split in data.splits() if split != "train"]
    for word in typed:
        key, _, value = word.partition("=")
        if key == "seed" and not drawing:
            yield Fault(
                f"'{word}' would be without effect: no stage draws", "leave it out, or choose stage=[...,split]"
            )
        for name in drawing:
            split = key.removeprefix(f"stage.{name}.")
            if key != split and split in given and value not in ("0", "0.0"):
                what = f"'{word}' would be without effect: the inputs have a {split} split of their own, which stays"
                yield Fault(what, f"leave {key} out, or leave the inputs' {split} out (data.{split}=)")


def _commas(inputs: Sequence[str]) -> Iterator[Fault]:
    """Names are joined by commas; one that has a comma can stand alone."""
    for name in inputs if len(inputs) > 1 else ():
        if "," in name:
            yield Fault(f"'{name}' has a comma, by which several names are parted", "rename it, or prepare it alone")


def _lacking(plan: Plan, catalogue: Catalogue) -> Iterator[Fault]:
    """Choices whose libraries come with an extra that is not installed."""
    for entry in plan.entries(catalogue):
        if entry.axis.name in ("data", "stage"):
            distribution, extra = entry.source.distribution, entry.offer.extra
            if lacking := extras.lacking(distribution, extra):
                yield Fault(f"{entry} needs {', '.join(lacking)}", f"pip install '{distribution}[{extra}]'")


def _checked(plan: Plan, catalogue: Catalogue) -> tuple[Data, dict[str, Stage]]:
    """The data and the stages. Raises UserError of everything that they say is wrong."""
    built: dict[str, Any] = {"": plan.build(catalogue, "data"), **plan.build(catalogue, "stage")}
    data, stages = built[""], {name: one for name, one in built.items() if name}
    faults = list(_disorder(stages))
    for part in built.values():
        try:
            part.check_pieces() if part is built[""] else part.check()
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return data, stages


def _disorder(stages: Mapping[str, Stage]) -> Iterator[Fault]:
    """Stages of no kind, and a split that is not the end."""
    for place, (name, stage) in enumerate(stages.items(), start=1):
        if not isinstance(stage, RowStage | DuplicateStage | SplitStage):
            yield Fault(f"stage={name} is of no kind that preparing knows", "its author must name one: RowStage, ...")
        if isinstance(stage, SplitStage) and place < len(stages):
            after = ", ".join(list(stages)[place:])
            yield Fault(f"stage={name} is followed by {after}: what is split stays as it is", f"put {name} last")


def _shown(name: str, node: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """What the manifest tells of a stage; of paths their last names, since the fingerprint says what was there."""
    settings = {key: _without_place(value) for key, value in node.items() if key not in ("name", *stage.aside)}
    return {"stage": name, "offer": node["name"], "settings": settings, "fingerprint": stage.fingerprint()}


def _without_place(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        return ",".join(part.rstrip("/").rpartition("/")[2] if _lies_here(part) else part for part in value.split(","))
    if isinstance(value, list):
        return [_without_place(one) for one in value]
    return {key: _without_place(one) for key, one in value.items()} if isinstance(value, dict) else value


def _lies_here(name: str) -> bool:
    path = Path(name.strip()).expanduser()
    return path.is_absolute() or path.exists() or any(mark in name for mark in "*?[")
