"""Preferences, reward models and distillation on the embedded task: `python benchmarks/preferences.py --help`.

Each seed has a chain of runs of its own: the default recipe, and what begins from it, every one a `loomtune train`.
What is there already is not run again, so the command may be stopped at any time. Nothing is chosen by what it prints:
the recipes' values were chosen on validation questions of seed 0, and the numbers are of test questions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from race import insert, processor

from loomtune import api
from loomtune.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "preferences.md"
MARKERS = "preferences"
SMALL, LAYERS = "small", 3
"""The folder of the student, and how many of the shipped model's layers it has."""

RANKS = "objective=cpo loss=[sigmoid] optimizer.lr=0 steps=1 evaluator=[heldout]"
"""A run that learns nothing and has no reference: of which pairs is the right query likelier?"""


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of the chain: its settings as typed, and the stage or folder whose model it starts from."""

    name: str
    settings: str
    start: str = ""


STAGES = (
    Stage("sft", "recipe=sql_quiz"),
    Stage("sft_ranks", f"recipe=sql_dpo {RANKS}", "sft"),
    Stage("dpo", "recipe=sql_dpo", "sft"),
    Stage("dpo_ranks", f"recipe=sql_dpo {RANKS}", "dpo"),
    Stage("longer", "recipe=sql_dpo objective=sft loss=[]", "sft"),
    Stage("longer_ranks", f"recipe=sql_dpo {RANKS}", "longer"),
    Stage("reward", "recipe=sql_reward", "sft"),
    Stage("alone", "recipe=sql_distill objective=sft", SMALL),
    Stage("distill", "recipe=sql_distill", SMALL),
    Stage("distill_loss", "recipe=sql_distill objective=sft optimizer.lr=0 steps=1 evaluator=[heldout]", "distill"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A stage with a seed, which decides on the questions of all splits and on the order of training."""

    stage: Stage
    seed: int
    asked: argparse.Namespace

    @property
    def folder(self) -> Path:
        """Of the run."""
        out: Path = self.asked.out
        return out / f"{self.stage.name}-{self.seed}"

    def plan(self) -> Plan:
        """Raises LoomtuneError where the run would be refused, for instance because its start has not been run."""
        count = self.asked.questions
        size = [f"data.seed={self.seed}", "data.validation=500", f"data.test={count}", "evaluate.before=false"]
        typed = ["sharding=single", "tracker=[jsonl]", f"seed={self.seed}", *size, *self.stage.settings.split()]
        measured = next((text for text in typed if text.startswith("evaluator=")), "")
        if self.stage.name != "reward" and not measured:
            typed += [f"evaluator.sql_accuracy.rows={count}"]
        if self.stage.name != "sft":
            typed += ["evaluator.heldout.split=test"]
        if self.stage.start:
            typed += [f"model.path='{self._model(self.stage.start)}'"]
        if self.stage.name == "distill":
            typed += [f"roles.teacher.model.path='{self._model('sft')}'"]
        return api.compose(typed)

    def _model(self, start: str) -> Path:
        out: Path = self.asked.out
        return out / (start if start == SMALL else f"{start}-{self.seed}")

    def result(self) -> dict[str, float] | None:
        """The metrics at its end; None where it has not come there, or where its settings were others."""
        if not (self.folder / "result.json").is_file() or not agree(Plan.load(self.folder).maths, self.plan().maths):
            return None
        found = api.Result.of(self.folder)
        return dict(found.metrics) if found.status == "completed" else None

    def run(self) -> str:
        """Runs it, on from its last checkpoint; gives what is to be said of it."""
        if self.result() is None:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            typed = [*self.plan().overrides, "launcher.procs=1", f"run.dir='{self.folder}'"]
            with self.folder.with_suffix(".log").open("ab") as log:
                subprocess.run(
                    [sys.executable, "-m", "loomtune.cli", "train", *typed], stdout=log, stderr=log, check=False
                )
        found = self.result()
        if found is None:
            return f"{self.folder.name} did not come to its end: {self.folder.with_suffix('.log')}"
        shown = {name: value for name, value in found.items() if name.startswith(("sql_", "heldout_"))}
        return f"{self.folder.name}: " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


def agree(before: Any, now: Any) -> bool:
    """Whether settings are the same, as far as both know them: one that came later says nothing of an earlier run."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(agree(before[key], now[key]) for key in before.keys() & now.keys())
    return bool(before == now)


def make_small(folder: Path) -> None:
    """The shipped model's first layers, with its embedding, last norm and tokenizer: a smaller model that knows SQL."""
    from safetensors.torch import load_file, save_file

    from loomtune_plugins.models.folders import TINY

    folder.mkdir(parents=True, exist_ok=True)
    for file in TINY.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    left_out = tuple(f"model.layers.{layer}." for layer in range(LAYERS, 100))
    weights = {
        name: kept for name, kept in load_file(TINY / "model.safetensors").items() if not name.startswith(left_out)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def chain(seed: int, asked: argparse.Namespace) -> None:
    """A seed's runs, one after the other, each after the one that it starts from."""
    for stage in STAGES:
        if asked.only in stage.name:
            print(Job(stage, seed, asked).run(), flush=True)


Cell = Callable[[dict[str, dict[str, float]]], float | None]
"""From the metrics of a seed's stages, by their names, to a number of its row; None where it was not run."""


def _of(stage: str, metric: str) -> Cell:
    return lambda found: found.get(stage, {}).get(metric)


ACCURACY, LIKELIER, PREFERRED = "sql_accuracy", "heldout_rewards/accuracies", "heldout_rewards/accuracies"
TABLES: tuple[tuple[str, str, dict[str, Cell]], ...] = (
    (
        "DPO",
        "The right query of a test pair is *likelier* where the policy gives it the higher log-probability, and "
        "*preferred* where it gained more over the reference than the wrong one. Longer: supervised fine-tuning with "
        "the same questions, steps and rate in DPO's place.",
        {
            "SFT: accuracy": _of("sft", ACCURACY),
            "likelier": _of("sft_ranks", LIKELIER),
            "DPO: accuracy": _of("dpo", ACCURACY),
            "likelier ": _of("dpo_ranks", LIKELIER),
            "preferred": _of("dpo", PREFERRED),
            "longer: accuracy": _of("longer", ACCURACY),
            "likelier  ": _of("longer_ranks", LIKELIER),
        },
    ),
    (
        "A reward model",
        "The share of test pairs whose right query has the higher reward.",
        {"accuracy": _of("reward", "heldout_accuracy")},
    ),
    (
        "Distillation",
        f"Teacher: the SFT run's model. Student: the shipped model's first {LAYERS} of 4 layers, trained by SFT alone "
        "and by its teacher, with the same questions, steps and rate. Loss: of the right queries to the test "
        "questions, in nats a token.",
        {
            "teacher: accuracy": _of("sft", ACCURACY),
            "SFT alone: accuracy": _of("alone", ACCURACY),
            "loss": _of("alone", "heldout_loss"),
            "distilled: accuracy": _of("distill", ACCURACY),
            "loss ": _of("distill_loss", "heldout_loss"),
        },
    ),
)


def tables(asked: argparse.Namespace) -> Iterator[str]:
    """Each of them with what there is, seed by seed, and a mean where no seed lacks the number."""
    found = {
        seed: {stage.name: done for stage in STAGES if (done := Job(stage, seed, asked).result()) is not None}
        for seed in asked.seeds
    }
    for title, said, columns in TABLES:
        rows = {str(seed): [of(found[seed]) for of in columns.values()] for seed in asked.seeds}
        whole = (list(column) for column in zip(*rows.values(), strict=True))
        rows["mean"] = [None if None in column else mean(map(float, column)) for column in whole]
        table = [["seed", *map(str.strip, columns)], ["---"] * (len(columns) + 1)]
        table += [[name, *map(_shown, columns, row)] for name, row in rows.items()]
        lines = "".join("| " + " | ".join(cells) + " |\n" for cells in table)
        yield f"### {title}\n\n{said}\n\n{lines}"


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "not run"
    return f"{value:.4f}" if column.strip() == "loss" else f"{value:.1%}"


SAID = """Written by `make preferences` on {today}: {versions}; {processor}, one thread each.

Every seed has its own questions, its own SFT run of the default recipe, and what begins from it. Accuracy: the share of
{questions} test questions whose query, drawn greedily, returns what the right one returns. Pairs are of the same
questions; schemas share no table or column name with those of training.
"""


def page(asked: argparse.Namespace) -> str:
    """The tables, with how they came about."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("loomtune", "torch", "transformers"))
    given = {"today": time.strftime("%Y-%m-%d"), "versions": versions, "processor": processor()}
    return "\n".join([SAID.format(**vars(asked), **given), *tables(asked)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only stages whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=1000, help="test questions, and pairs")
    parser.add_argument("--at-once", type=int, default=2, help="seeds at the same time, one core each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "preferences", help="folder of the runs")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    asked.out = asked.out.absolute()
    os.environ["OMP_NUM_THREADS"] = "1"
    make_small(asked.out / SMALL)
    with ThreadPoolExecutor(asked.at_once) as pool:
        list(pool.map(lambda seed: chain(seed, asked), asked.seeds))
    said = page(asked)
    print(f"\n{said}")
    if asked.write:
        insert(PAGE, said, MARKERS)


if __name__ == "__main__":
    main()
