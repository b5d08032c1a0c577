"""Every adapter on the embedded task, each with learning rates to choose from: `python benchmarks/adapters.py --help`.

A run is `loomtune train adapter=... optimizer.lr=...` on one process, two runs at once. What is there already is not
run again, so the command may be stopped at any time. The rate is chosen by the execution accuracy on the validation
questions; what is reported is that on the test questions, which choose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from race import insert, processor

from loomtune import api
from loomtune.catalogue import installed
from loomtune.errors import LoomtuneError
from loomtune.plan import Plan
from loomtune_plugins.trackers import metrics

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adapters.md"
MARKERS = "sweep"
LOSS, ACCURACY = "heldout_loss", "sql_accuracy"
CHOICE = "validation.json"
"""What a run's folder holds beside its own files: its metrics on the validation questions."""


@dataclass(frozen=True, slots=True)
class Swept:
    """An adapter with settings, as typed, and the learning rates that it is tried with."""

    label: str
    settings: str
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """As the catalogue knows it."""
        return self.settings.split()[0].removeprefix("adapter=")


SWEPT = (
    Swept("full", "adapter=full", (1e-3, 2e-3, 3e-3)),
    Swept("lora, rank 16", "adapter=lora", (3e-3, 6e-3, 1e-2)),
    Swept("qlora, rank 16", "adapter=qlora", (6e-3,)),
    Swept("ia3", "adapter=ia3", (1e-2, 3e-2)),
    Swept("bottleneck, Houlsby", "adapter=bottleneck adapter.reduction=4", (3e-3,)),
    Swept("bottleneck, Pfeiffer", "adapter=bottleneck adapter.variant=pfeiffer adapter.reduction=4", (3e-3,)),
    Swept("prefix", "adapter=prefix", (1e-2,)),
    Swept("prompt", "adapter=prompt", (1e-1,)),
    Swept("ptuning", "adapter=ptuning", (3e-3,)),
    Swept("adalora", "adapter=adalora", (6e-3,)),
    Swept("oft", "adapter=oft", (5e-3,)),
    Swept("coft", "adapter=coft adapter.eps=1e-2", (5e-3,)),
    Swept("lora, rank 16, DoRA", "adapter=lora adapter.dora=true", (6e-3,)),
    Swept("lora, rank 16, PiSSA", "adapter=lora adapter.init=pissa", (3e-3,)),
    Swept("lora, rank 16, rsLoRA", "adapter=lora adapter.rslora=true", (3e-3,)),
    Swept("lora, rank 16, LoRA+", "adapter=lora adapter.plus_ratio=16", (1e-3,)),
    Swept("lora, rank 4", "adapter=lora adapter.rank=4", (6e-3,)),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: a sweep's line at one rate, with everything that makes its hash."""

    swept: Swept
    rate: float
    plan: Plan
    folder: Path

    @classmethod
    def of(cls, swept: Swept, rate: float, asked: argparse.Namespace) -> Trial:
        """Raises LoomtuneError where the run would be refused."""
        count = asked.questions
        size = [f"data.validation={count}", f"data.test={count}", f"evaluator.{ACCURACY}.rows={count}"]
        run = ["sharding=single", "tracker=[jsonl]", f"steps={asked.steps}", f"seed={asked.seed}", *size]
        plan = api.compose([*run, *swept.settings.split(), f"optimizer.lr={rate}"])
        return cls(swept, rate, plan, asked.out / f"{swept.name}-{rate:g}-{plan.hash[:8]}")

    @property
    def log(self) -> Path:
        """What the run says."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def result(self) -> dict[str, Any] | None:
        """What the run ended with; None where it has not."""
        if not (self.folder / "result.json").is_file() or Plan.load(self.folder).hash != self.plan.hash:
            return None
        found = api.Result.of(self.folder)
        lines = [line for line in metrics.read(self.folder) if line["step"]]
        return {
            **found.metrics,
            "status": found.status,
            "seconds": sum(line["seconds"] for line in lines),
            "memory": max((line["memory_bytes"] for line in lines), default=0),
            "validation": self.validation(),
            "before": next((line[f"{ACCURACY}_before"] for line in metrics.read(self.folder)[:1]), None),
        }

    def validation(self) -> float | None:
        """Execution accuracy on the validation questions; None where it was not measured."""
        path = self.folder / CHOICE
        found: float | None = json.loads(path.read_text())[ACCURACY] if path.is_file() else None
        return found

    def validate(self, questions: int) -> None:
        """Measures it, once."""
        if (self.folder / "result.json").is_file() and self.validation() is None:
            asked = [f"evaluator=[{ACCURACY}]", f"evaluator.{ACCURACY}.split=validation"]
            found = api.evaluate(self.folder, [*asked, f"evaluator.{ACCURACY}.rows={questions}"])
            (self.folder / CHOICE).write_text(json.dumps(found))

    def run(self) -> str:
        """Runs it, on from its last checkpoint; gives what is to be said of it."""
        if (found := self.result()) is None or found["status"] not in ("completed", "failed"):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "loomtune.cli", "train", *self.plan.overrides, f"run.dir='{self.folder}'"]
            with self.log.open("ab") as log:
                subprocess.run(command, stdout=log, stderr=log, check=False)
            found = self.result()
        if found is None:
            return f"{self.swept.label} at {self.rate:g} ended without a result: {self.log}"
        numbers = "  ".join(f"{name} {found[name]:.4g}" for name in (LOSS, ACCURACY) if found.get(name) is not None)
        return f"{self.swept.label} at {self.rate:g}: {found['status']}  {numbers}  {found['seconds']:.0f} s"


def trials(asked: argparse.Namespace) -> Iterator[Trial]:
    """All that can be run; what is refused is said."""
    for swept in SWEPT:
        if asked.only in swept.label and swept.name in installed().names("adapter"):
            try:
                yield from [Trial.of(swept, rate, asked) for rate in swept.rates]
            except LoomtuneError as error:
                print(f"{swept.label} is left out: {error}", file=sys.stderr)


def counted(plan: Plan) -> tuple[int, int]:
    """(parameters that are trained, parameters that the model has by itself)."""
    import torch

    model, adapter = (plan.build(installed(), axis) for axis in ("model", "adapter"))
    weights = model.weights(plan.root.seed)
    adapter.meet(model)
    with torch.device("meta"):
        skeleton = model.skeleton()
    woven, _ = adapter.weave(skeleton, weights, plan.root.seed)
    trained = sum(parameter.numel() for parameter in woven.parameters() if parameter.requires_grad)
    return trained, sum(prod(shape) for shape in weights.shapes().values())


def best(of: Sequence[tuple[Trial, dict[str, Any]]]) -> tuple[Trial, dict[str, Any]] | None:
    """The run that answers most of the validation questions, of those that came to their end."""
    ended = [(t, r) for t, r in of if r["status"] == "completed" and r["validation"] is not None]
    return max(ended, key=lambda one: one[1]["validation"], default=None)


HEAD = ("adapter", "trained", "share", "rates tried", "rate", "validation loss", "validation accuracy", "accuracy",
        "gain", "peak memory, MiB", "seconds")  # fmt: skip


def rows(tried: Sequence[Trial]) -> Iterator[tuple[str, ...]]:
    """A row for each line of the sweep that has a run."""
    ended = [(trial, result) for trial in tried if (result := trial.result()) is not None]
    reference = best([one for one in ended if one[0].swept == SWEPT[0]])
    for swept in dict.fromkeys(trial.swept for trial, _ in ended):
        mine = [one for one in ended if one[0].swept == swept]
        rates = ", ".join(f"{t.rate:g}" + ("" if r["status"] == "completed" else " (failed)") for t, r in mine)
        chosen = best(mine)
        if chosen is None:
            yield (swept.label, "", "", rates, *[""] * (len(HEAD) - 4))
            continue
        trial, result = chosen
        trained, model = counted(trial.plan)
        numbers = (f"{result[LOSS]:.4f}", f"{result['validation']:.1%}", f"{result[ACCURACY]:.1%}")
        gained = "" if reference is None else gain(result, reference[1])
        cost = (f"{result['memory'] / 2**20:,.0f}", f"{result['seconds']:.0f}")
        yield (swept.label, f"{trained:,}", f"{trained / model:.2%}", rates, f"{trial.rate:g}", *numbers, gained, *cost)


def gain(result: dict[str, Any], reference: dict[str, Any]) -> str:
    """What training added to the accuracy, as a share of what full fine-tuning added."""
    whole = reference[ACCURACY] - reference["before"]
    return f"{(result[ACCURACY] - result['before']) / whole:.0%}" if whole else ""


SAID = """Written by `make adapter-sweep` on {today}: {versions}; {processor}, one thread each,
{at_once} runs at once.

The default recipe, {steps} steps, seed {seed}, on one process. Of the rates named, the learning rate is the one with
the highest execution accuracy on {questions} validation questions. Accuracy: the share of {questions} test questions
whose query, drawn greedily, returns what the right one returns; before training {before}. Gain: what training added to
it, as a share of what full fine-tuning added. One seed: rounding alone moves an accuracy by some points. Memory: the
largest resident set of the process, of which the libraries alone take some hundreds of MiB. Seconds: in optimizer
steps, without evaluation.
"""


def page(tried: Sequence[Trial], asked: argparse.Namespace) -> str:
    """The table, with how it came about."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("loomtune", "torch", "transformers", "peft"))
    results = [result for trial in tried if (result := trial.result()) is not None]
    before = next((f"{result['before']:.1%}" for result in results if result["before"] is not None), "unknown")
    given = {"today": time.strftime("%Y-%m-%d"), "versions": versions, "processor": processor()}
    table = [HEAD, ("---",) * len(HEAD), *rows(tried)]
    lines = "".join("| " + " | ".join(cells) + " |\n" for cells in table)
    return SAID.format(**vars(asked), **given, before=before) + "\n" + lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only adapters whose label contains this")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run")
    parser.add_argument("--questions", type=int, default=1000, help="of validation, and of test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "adapters", help="folder of the runs")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    asked.out = asked.out.absolute()
    os.environ["OMP_NUM_THREADS"] = "1"
    tried = list(trials(asked))
    with ThreadPoolExecutor(asked.at_once) as pool:
        for said in pool.map(Trial.run, tried):
            print(said, flush=True)
    for trial in tried:
        trial.validate(asked.questions)
    everything = tried if not asked.only else list(trials(argparse.Namespace(**{**vars(asked), "only": ""})))
    said = page(everything, asked)
    print(f"\n{said}")
    if asked.write:
        insert(PAGE, said, MARKERS)


if __name__ == "__main__":
    main()
