"""Cells of `loomtune matrix` that are said to work, run for real: `make matrix`.

A cell trains 3 steps on the processes that the matrix names, is stopped, goes on for 3 more under another sharding, and
is exported. What is printed is how far its curves, and the logits of what was exported, are from those of one process
left alone. Ends with 1 where a bound is exceeded or anything fails. `--only` runs the cells whose name contains a text;
`--write` renews their rows in docs/matrix.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loomtune import checkpoint
from loomtune.catalogue import BUILT_IN_DISTRIBUTION
from loomtune.errors import LoomtuneError
from loomtune.export import export
from loomtune.offers import Trait
from loomtune_plugins.commands.cells import VARIED, Cell, cells
from runs.adapting import in_transformers, with_adapter
from runs.curves import LOSS, NORM, largest
from runs.worlds import Failed, Outcome, Worlds
from support import ROOT, mixed_rows, tiny_llama, write_rows

FIRST, STEPS = 3, 6
LOGITS = 1e-4
"""Largest difference of exported logits, relative to the largest logit: Adam divides small gradients by themselves."""

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "loomtune")
PAGE = ROOT / "docs" / "matrix.md"
HEAD = (*VARIED, "ranks", "verdict", "loss", "norm", "resumed under", "loss ", "norm ", "export", "measured")


@dataclass(frozen=True)
class Measured:
    """How far a cell is from one process. loss, norm: in its own steps and in those after it was resumed."""

    first: tuple[float, float]
    partner: Cell
    resumed: tuple[float, float]
    exported: float

    @property
    def fault(self) -> str:
        """Which bound is exceeded; empty where none is."""
        losses, norms = zip(self.first, self.resumed, strict=True)
        found = {"loss": (max(losses), LOSS), "norm": (max(norms), NORM), "export": (self.exported, LOGITS)}
        return ", ".join(f"{name} {value:.1e}" for name, (value, bound) in found.items() if not value < bound)


def name_of(cell: Cell) -> str:
    """A cell as it is named on the command line."""
    return " x ".join(choice.label for choice in cell.choices.values())


THOROUGH = ("full", "lora")
"""Adapters that are run under every sharding; the others, and other objectives than `sft`, under the plain ones."""

PLAIN = ("single", "fsdp", "zero stage 3")


def built_in() -> list[Cell]:
    """The cells whose three offers are ours, of which so many are run that each choice has met each plain sharding.

    Not those of objectives that draw what they learn from: tests of their own hold these to one process
    (`tests/runs/rolled.py`).
    """
    found = [c for c in cells() if Trait.GENERATION not in c.choices["objective"].entry.offer.needs]
    ours = [c for c in found if all(o.entry.source.distribution == BUILT_IN_DISTRIBUTION for o in c.choices.values())]
    return [cell for cell in ours if _is_run(*(choice.label for choice in cell.choices.values()))]


def _is_run(objective: str, adapter: str, sharding: str) -> bool:
    if objective == "sft":
        return adapter in THOROUGH or sharding in PLAIN
    return sharding in PLAIN and (adapter == "full" or (objective, adapter) == ("dpo", "lora"))


def partner(cell: Cell, among: Sequence[Cell]) -> Cell:
    """Another working sharding of the same objective and adapter, far down the table: another family, mostly."""
    kin = [o for o in among if o.status == "works" and all(o.choices[a] == cell.choices[a] for a in VARIED[:2])]
    return kin[(kin.index(cell) + max(1, len(kin) // 2 - 1)) % len(kin)]


class Bench:
    """A tiny model, rows for each kind of objective, worlds of processes, and the runs on one process."""

    def __init__(self, folder: Path, worlds: Worlds) -> None:
        self.folder, self.worlds = folder, worlds
        self.model = tiny_llama(folder / "tiny", tied=True)
        self.teacher = tiny_llama(folder / "teacher")
        answers = mixed_rows(64)
        pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"] + "?"} for r in answers]
        labels = [{**row, "label": number % 3 > 0} for number, row in enumerate(answers)]
        texts = [{"text": row["prompt"] + row["completion"]} for row in answers]
        rows = {Trait.COMPLETIONS: answers, Trait.PAIRS: pairs, Trait.LABELS: labels, Trait.TEXTS: texts}
        self.rows = {trait: write_rows(folder / f"{trait}.jsonl", found) for trait, found in rows.items()}
        self._alone: dict[tuple[str, ...], Outcome] = {}

    def settings(self, cell: Cell) -> list[str]:
        """All but the layout: equal for all cells of an objective and an adapter."""
        (need,) = cell.choices["objective"].entry.offer.needs & self.rows.keys()
        run = [f"model.path={self.model}", "data=jsonl", f"data.path={self.rows[Trait(need)]}", "optimizer.lr=1e-3"]
        how = [f"steps={STEPS}", "tracker=[jsonl]", "checkpoint.background=false"]
        if cell.choices["objective"].label == "distill":
            run.append(f"roles.teacher.model.path={self.teacher}")
        return ["recipe=null", *run, *how, *(text for axis in VARIED[:2] for text in cell.choices[axis].typed)]

    def alone(self, cell: Cell) -> Outcome:
        """The run on one process, made once for each objective and adapter."""
        settings = (*self.settings(cell), "sharding=single")
        if settings not in self._alone:
            folder = self.folder / f"alone-{len(self._alone)}"
            self._alone[settings] = self.worlds.train(1, settings, folder)
            export(folder, to=exporter(cell))
        return self._alone[settings]

    def measure(self, cell: Cell, other: Cell) -> Measured:
        """Trains, stops, resumes under the other cell's sharding, exports, and compares."""
        alone, folder = self.alone(cell), self.folder / name_of(cell).replace(" ", "-")
        how = cell.choices["sharding"].typed
        first = self.worlds.train(cell.processes, [*self.settings(cell), *how, f"stop_after={FIRST}"], folder)
        began = apart(first, alone, slice(FIRST))
        whole = self.worlds.resume(other.processes, folder, *other.choices["sharding"].typed)
        assert whole.result["status"] == "completed" and len(whole.lines) == STEPS
        left = self.exported(folder, alone.folder, exporter(cell))
        return Measured(began, other, apart(whole, alone, slice(FIRST, STEPS)), left)

    def exported(self, folder: Path, alone: Path, to: str) -> float:
        """How far logits are from one process', those of what is exported and of the checkpoint's own folder."""
        wanted = logits(alone / "export" / to, self.model)
        latest = checkpoint.latest(folder / "checkpoints")
        assert latest is not None
        own = latest / ("adapter" if (latest / "adapter").is_dir() else "model")
        found = [logits(left, self.model) for left in (export(folder, to=to), own)]
        return max(float((one - wanted).abs().max() / wanted.abs().max()) for one in found)


def exporter(cell: Cell) -> str:
    """By which a run leaves: merged where its adapter can be, else the adapter alone."""
    return "adapter" if Trait.UNMERGEABLE in cell.choices["adapter"].entry.offer.provides else "huggingface"


def apart(found: Outcome, alone: Outcome, where: slice) -> tuple[float, float]:
    """Largest relative differences of loss and gradient norm over some steps, which saw the same tokens."""
    assert found.series("tokens")[where] == alone.series("tokens")[where]
    loss, norm = (largest(found.series(name)[where], alone.series(name)[where]) for name in ("loss", "grad_norm"))
    return loss, norm


@cache
def logits(folder: Path, base: Path) -> Any:
    """What a model of transformers says of a fixed text: that of a folder, or the base with a folder's adapter."""
    import torch
    from transformers import AutoTokenizer

    alone = not (folder / "adapter_config.json").exists()
    model = in_transformers(folder) if alone else with_adapter(in_transformers(base), folder)
    tokens = AutoTokenizer.from_pretrained(base)("warp weft? praw", return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(tokens).logits.float()


def row(cell: Cell, measured: Measured | None = None, failure: str = "") -> tuple[str, ...]:
    """A row of the page."""
    names = tuple(choice.label for choice in cell.choices.values())
    head = (*names, str(cell.processes), failure or verdict(cell, measured))
    if measured is None:
        return (*head, *[""] * 6, date.today().isoformat() if failure else "")
    numbers = [f"{value:.1e}" for value in (*measured.first, *measured.resumed, measured.exported)]
    other = f"{measured.partner.choices['sharding'].label} on {measured.partner.processes}"
    return (*head, *numbers[:2], other, *numbers[2:], date.today().isoformat())


def verdict(cell: Cell, measured: Measured | None) -> str:
    """What the matrix says, with the reason, or the bound that the run exceeded."""
    if measured is not None and measured.fault:
        return f"EXCEEDED: {measured.fault}"
    said = {"works": "works", "needs": f"needs {', '.join(cell.extras)}"}
    return said.get(cell.status) or "refused: " + "; ".join(fault.what for fault in cell.faults)


def run(bench: Bench, asked: Sequence[Cell], among: Sequence[Cell]) -> Iterator[tuple[str, ...]]:
    """The rows of the cells asked for, as they are measured."""
    for cell in asked:
        if cell.status != "works":
            yield row(cell)
            continue
        other = partner(cell, among)
        try:
            yield row(cell, bench.measure(cell, other))
        except (Failed, LoomtuneError, RuntimeError, AssertionError) as error:
            for size in {cell.processes, other.processes}:
                bench.worlds.of(size).stop()
            yield row(cell, failure=f"FAILED, then under {name_of(other)}: {' '.join(str(error).split())[:300]}")


def known() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The rows of the page as it is, by the labels of their cells."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    found = [tuple(text.strip() for text in line.strip("|").split(" | ")) for line in lines if line.startswith("| ")]
    return {one[: len(VARIED)]: one for one in found[2:] if len(one) == len(HEAD)}


INTRODUCTION = """# What goes with what, measured

Written by `make matrix` on {today}: {versions}, on CPUs.

`loomtune matrix` computes which objective, adapter and sharding go together, from what each plugin declares. Here
`sft` was run with {thorough} under every sharding, and every other adapter and objective under {plain}; in every cell
a tiny Llama with tied embeddings trains {first} steps of 8 rows of mixed
lengths in fp32 with AdamW, saves and stops, goes on to step {steps} under the sharding named, and is exported. Numbers
are largest relative differences from one process that was left alone: of loss and gradient norm (before clipping),
before and after the move, and of the logits of the exported model and of the checkpoint's own folder (`model/`, or
`adapter/` opened by peft; bottleneck adapters, which peft has not, by loomtune). Adapters that cannot be merged are
exported by themselves. Bounds: loss {loss:.0e}, gradient norm {norm:.0e}, logits {logits:.0e}. Each refusal's
words are tested.
"""


def page(found: Sequence[tuple[str, ...]]) -> str:
    """The page that is committed."""
    versions = ", ".join([*(f"{name} {version(name)}" for name in LIBRARIES), f"Python {sys.version.split()[0]}"])
    said = {"thorough": " and ".join(THOROUGH), "plain": ", ".join(PLAIN)}
    given = {**said, "today": date.today().isoformat(), "versions": versions, "first": FIRST, "steps": STEPS}
    text = INTRODUCTION.format(**given, loss=LOSS, norm=NORM, logits=LOGITS)
    table = [HEAD, ("---",) * len(HEAD), *found]
    return "\n".join([text, *("| " + " | ".join(texts) + " |" for texts in table), ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only cells whose name, such as `sft x lora x fsdp`, contains this")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    from transformers.utils import logging

    among, began, found = built_in(), time.monotonic(), {}
    asked = [cell for cell in among if options.only in name_of(cell)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"LOOMTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        logging.disable_progress_bar()
        worlds = Worlds(folder)
        try:
            print("  ".join(HEAD))
            for made in run(Bench(folder, worlds), asked, among):
                found[made[: len(VARIED)]] = made
                print("  ".join(made), flush=True)
        finally:
            worlds.stop()
    wrong = sum("EXCEEDED" in made[4] or "FAILED" in made[4] for made in found.values())
    print(f"{len(found)} cells in {time.monotonic() - began:.0f} s, {wrong} wrong")
    if options.write:
        merged = known() | found
        kept = [tuple(choice.label for choice in cell.choices.values()) for cell in among]
        PAGE.write_text(page([merged[names] for names in kept if names in merged]))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
