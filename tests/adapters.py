"""Every adapter on one process, under FSDP2 and under ZeRO 3, compared: `make adapters`.

An adapter learns for 40 steps. What is printed is how far its curves are from those of one process, whether everything
that is not trained kept its bits, and how far the logits of what it leaves (its adapter opened by peft, its merged
export by transformers) are from those of the run itself. Ends with 1 where a bound is exceeded or anything fails. To
add an adapter, add a line to `METHODS`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.export import export
from parity import LAYOUTS, Layout
from runs.adapting import in_transformers, reopened, said, trained
from runs.curves import NORM, largest
from runs.worlds import Outcome, Worlds
from support import ROOT, SHARED, write_rows

STEPS, SIZE = 40, 8
LOSS = 5e-6
"""Largest relative difference of losses over 40 steps; that of gradient norms is everybody's."""

LOGITS = 1e-5
"""Largest difference of logits, relative to the largest one."""

FALLS = 0.9
"""What must be left of the first loss, at most, over the last 5 steps; where nothing is learned, all curves agree."""

PAGE = ROOT / "docs" / "adapters.md"
BEGIN, END = "<!-- shardings: begin -->", "<!-- shardings: end -->"
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "loomtune")


@dataclass(frozen=True)
class Method:
    """An adapter as it is run. settings: as typed, dropout off. rate: at which its loss clearly falls.

    loss, norm: its bounds, which only a reason widens.
    """

    label: str
    rate: float
    settings: str = ""
    loss: float = LOSS
    norm: float = NORM

    @property
    def name(self) -> str:
        """As the catalogue knows it."""
        return self.label.split()[0]

    @property
    def typed(self) -> list[str]:
        """As typed."""
        return [f"adapter={self.name}", *self.settings.split(), f"optimizer.lr={self.rate}"]


METHODS = (
    Method("full", 1e-3),
    Method("full frozen", 1e-3, "adapter.freeze=[model.embed_tokens,model.layers.0]"),
    Method("lora", 1e-3, "adapter.rank=4"),
    Method("lora dora", 1e-3, "adapter.rank=4 adapter.dora=true"),
    Method("lora pissa", 1e-3, "adapter.rank=4 adapter.init=pissa"),
    Method("lora modules", 2e-3, "adapter.rank=4 adapter.modules=[*norm] adapter.tokens=[5,6,7]"),
    Method("adalora", 2e-3, "adapter.init_rank=6 adapter.target_rank=4 adapter.delta_t=5"),
    Method("ia3", 1e-2),
    Method("qlora", 2e-3, "adapter.rank=4"),
    Method("oft", 3e-3, "adapter.block_size=4"),
    Method("coft", 3e-3, "adapter.block_size=4 adapter.eps=1e-1"),
    Method("bottleneck", 3e-3, "adapter.size=8"),
    Method("bottleneck pfeiffer", 3e-3, "adapter.size=8 adapter.variant=pfeiffer"),
    Method("prompt", 1e-2),
    # Adam divides gradients of the encoder that are almost 0 by themselves; with SGD norms agree to 6e-7.
    Method("ptuning", 1e-3, norm=1e-4),
    Method("prefix", 1e-2),
    Method("prefix projection", 2e-3, "adapter.projection=true"),
)
"""Rates at which differences in the last bits do not grow by themselves: LoRA's do at 1e-2, tenfold in 9 steps, and a
little at 2e-3."""

SHARDINGS = tuple(layout for layout in LAYOUTS if layout.name in ("single", "fsdp", "zero 3"))


@dataclass(frozen=True)
class Row:
    """What came of an adapter under a sharding. None: not measured, for the reason that `told` gives."""

    method: Method
    layout: Layout
    fell: tuple[float, float] | None = None
    loss: float | None = None
    norm: float | None = None
    frozen: int | None = None
    reopened: float | None = None
    merged: float | None = None
    told: str = ""
    wrong: bool = False


def methods() -> list[Method]:
    """Those of adapters that are there, and what nobody has written a line for."""
    there = installed().names("adapter")
    known = {method.name for method in METHODS}
    return [m for m in METHODS if m.name in there] + [Method(name, 1e-2) for name in there if name not in known]


def settings(folder: Path, steps: int = STEPS) -> list[str]:
    """The run, whose adapter and sharding alone change: short rows of GSM8K, each of which is met once."""
    model, source = SHARED / "models" / "stories260k", SHARED / "data" / "gsm8k" / "train.jsonl"
    found = [json.loads(line) for line in source.read_text().splitlines()]
    short = [row for row in found if len(row["question"]) + len(row["answer"]) < 260]
    rows = write_rows(folder / "gsm8k.jsonl", short[: STEPS * SIZE])
    data = ["data=jsonl", f"data.path={rows}", "data.prompt=question", "data.completion=answer"]
    run = [f"steps={steps}", f"batch.size={SIZE}", "schedule=constant", "tracker=[jsonl]", "guard=[]"]
    return [f"model.path={model}", *data, *run, "checkpoint.background=false"]


class Bench:
    """A run's settings, worlds of processes, and the run of each method on one process."""

    def __init__(self, folder: Path, worlds: Worlds, steps: int = STEPS) -> None:
        self.folder, self.worlds, self.steps = folder, worlds, steps
        self.settings = settings(folder, steps)
        self.base = SHARED / "models" / "stories260k"
        self._alone: dict[Method, Outcome] = {}

    def row(self, method: Method, layout: Layout) -> Row:
        """Trains, compares, opens what is left. Refusals that `loomtune train` makes before it starts are told."""
        try:
            return self._measured(method, layout, self._run(method, layout))
        except UserError as error:
            return Row(method, layout, told="refused: " + "; ".join(fault.what for fault in error.faults))
        except Exception as error:  # whatever it is, the others are still to be measured
            traceback.print_exc()
            self.worlds.of(layout.smallest).stop()
            said = " ".join(f"{type(error).__name__}: {error}".split())
            return Row(method, layout, told=f"FAILED: {said[:300]}", wrong=True)

    def _run(self, method: Method, layout: Layout) -> Outcome:
        if layout.smallest == 1 and method in self._alone:
            return self._alone[method]
        place = self.folder / f"{method.label}-{layout.name}".replace(" ", "-")
        typed = [*self.settings, *method.typed, *layout.settings.split()]
        found = self.worlds.train(layout.smallest, typed, place, trained)
        if layout.smallest == 1:
            self._alone[method] = found
        return found

    def _measured(self, method: Method, layout: Layout, found: Outcome) -> Row:
        alone, told = self._run(method, SHARDINGS[0]), []
        assert found.series("tokens") == alone.series("tokens"), "other rows"
        losses = found.series("loss")
        fell = losses[0], sum(losses[-5:]) / 5
        loss, norm = (largest(found.series(name), alone.series(name)) for name in ("loss", "grad_norm"))
        if self.steps == STEPS and not fell[1] < FALLS * fell[0]:
            told.append("the loss does not fall")
        if changed := found.result["changed"]:
            told.append(f"{len(changed)} frozen tensors have changed, {changed[0]} for one")
        wanted = said(found.folder)
        again = wanted.apart(reopened(found.folder, self.base, wanted.others))
        merged, why = None, ""
        try:
            model = in_transformers(export(found.folder))
            # What was trained on an approximation of the base is merged into the base itself.
            exact = wanted if wanted.exact else wanted.said_by(reopened(found.folder, self.base, {}))
            merged = exact.apart(model)
        except UserError as error:
            why = f"not merged: {error.faults[0].what.rpartition(': ')[2]}"
        bounds = {"loss": (loss, method.loss), "gradient norm": (norm, method.norm)}
        bounds |= {"reopened": (again, LOGITS), "merged": (merged or 0.0, LOGITS)}
        told += [f"{name} {value:.1e}" for name, (value, bound) in bounds.items() if not value < bound]
        wrong = f"EXCEEDED: {', '.join(told)}" if told else ""
        note = "; ".join(text for text in (wrong, why) if text)
        return Row(method, layout, fell, loss, norm, found.result["frozen"], again, merged, note, bool(told))


HEAD = ("adapter", "sharding", "ranks", "loss falls", "loss", "gradient norm", "frozen", "reopened", "merged", "")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    fell = "" if row.fell is None else f"{row.fell[0]:.2f} to {row.fell[1]:.2f}"
    numbers = ["" if number is None else f"{number:.1e}" for number in (row.loss, row.norm)]
    left = ["" if number is None else f"{number:.1e}" for number in (row.reopened, row.merged)]
    frozen = "" if row.frozen is None else str(row.frozen)
    return (row.method.label, row.layout.name, str(row.layout.smallest), fell, *numbers, frozen, *left, row.told)


def known() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The rows of the page as it is, by adapter and sharding."""
    text = PAGE.read_text() if PAGE.exists() else ""
    lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    found = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines if line.startswith("| ")]
    return {row[:2]: row for row in found[2:] if len(row) == len(HEAD)}


def table(found: Sequence[tuple[str, ...]]) -> str:
    """What stands between the marks of the page."""
    versions = ", ".join([*(f"{name} {version(name)}" for name in LIBRARIES), f"Python {sys.version.split()[0]}"])
    rows = [HEAD, ("---",) * len(HEAD), *found]
    text = f"Written by `make adapters` on {date.today().isoformat()}: {versions}, on CPUs.\n\n"
    return text + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def write(found: dict[tuple[str, ...], tuple[str, ...]]) -> None:
    """Renews the rows that were measured; what is there no more goes."""
    rows = known() | found
    kept = [(method.label, layout.name) for method in methods() for layout in SHARDINGS]
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table([rows[name] for name in kept if name in rows])}{END}{after}")


def measure(bench: Bench, only: str) -> Iterator[Row]:
    """The rows asked for, one after the other."""
    for method in methods():
        for layout in SHARDINGS:
            if only in f"{method.label} x {layout.name}":
                yield bench.row(method, layout)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name, such as `lora dora x fsdp`, contains this")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    if not (SHARED / "models" / "stories260k").is_dir():
        raise SystemExit(f"{SHARED} is absent; LOOMTUNE_SHARED names the folder of models and data")
    from transformers.utils import logging

    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"LOOMTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        logging.disable_progress_bar()
        worlds = Worlds(folder)
        try:
            print("  ".join(HEAD))
            for row in measure(Bench(folder, worlds), asked.only):
                found[row.method.label, row.layout.name] = row
                print("  ".join(cells(row)), flush=True)
                if asked.write:
                    write({names: cells(one) for names, one in found.items()})
        finally:
            worlds.stop()
    wrong = sum(row.wrong for row in found.values())
    print(f"{len(found)} runs in {time.monotonic() - began:.0f} s, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
