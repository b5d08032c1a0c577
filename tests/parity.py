"""One training run under every sharding, world size, micro-batch and packing, compared: `make parity`.

The maths never depends on the machine: what is printed is how far the curves are from those of one process. By default
a fair sample runs, each layout on its smallest world and on 4 processes; `--all` runs the full product. Ends with 1
where a bound is exceeded. To add a layout, add a line to `LAYOUTS`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path

from loomtune.catalogue import installed
from loomtune.errors import UserError
from runs.curves import LOSS, NORM, largest
from runs.worlds import Failed, Outcome, Worlds
from support import ROOT, SHARED, write_rows

STEPS, SIZE = 40, 8
BF16_LOSS = 5e-3
LIBRARIES = ("torch", "transformers", "deepspeed", "loomtune")
TABLE = ROOT / "docs" / "parity.md"


@dataclass(frozen=True)
class Layout:
    """A way to lay a run out. worlds: how many processes it can be asked for; settings: as typed."""

    name: str
    worlds: tuple[int, ...]
    settings: str

    @property
    def smallest(self) -> int:
        """The smallest world on which there is something to share."""
        return next((world for world in self.worlds if world > 1), 1)


LAYOUTS = (
    Layout("single", (1,), "sharding=single"),
    Layout("ddp", (1, 2, 4), "sharding=ddp"),
    Layout("fsdp", (1, 2, 4), "sharding=fsdp"),
    Layout("hsdp 2 x n", (2, 4), "sharding=fsdp sharding.replicate=2"),
    Layout("fsdp, offload", (1, 2, 4), "sharding=fsdp sharding.offload=true"),
    Layout("fsdp, tensor 2", (2, 4), "sharding=fsdp sharding.tensor=2"),
    Layout("fsdp, sequence 2", (2, 4), "sharding=fsdp sharding.sequence=2"),
    Layout("ddp, sequence 2", (2, 4), "sharding=ddp sharding.sequence=2"),
    Layout("zero 1", (1, 2, 4), "sharding=zero sharding.stage=1"),
    Layout("zero 2", (1, 2, 4), "sharding=zero sharding.stage=2"),
    Layout("zero 3", (1, 2, 4), "sharding=zero sharding.stage=3"),
    Layout("zero 3, offload", (1, 2, 4), "sharding=zero sharding.stage=3 sharding.offload=all"),
)
MICRO = {"1": "1", "auto": "auto", "all": str(SIZE)}
VARIED = ("single", "fsdp", "zero 3")
"""Layouts of which the sample also has other micro-batches."""


@dataclass(frozen=True)
class Cell:
    """One run of the product. micro: a key of `MICRO`."""

    layout: Layout
    world: int
    micro: str = "auto"
    packing: bool = False

    @property
    def settings(self) -> list[str]:
        """As typed."""
        how = [f"batch.micro={MICRO[self.micro]}", f"packing={str(self.packing).lower()}"]
        return [*self.layout.settings.split(), *how]


@dataclass(frozen=True)
class Row:
    """What came of a cell: the largest relative differences, or why there are none."""

    cell: Cell
    loss: float | None = None
    norm: float | None = None
    said: str = ""
    wrong: bool = False


def product() -> list[Cell]:
    """Every layout on every world, with every micro-batch, packed and not."""
    return [
        Cell(layout, world, micro, packing)
        for layout in LAYOUTS
        for world in layout.worlds
        for micro in MICRO
        for packing in (False, True)
    ]


def sample() -> list[Cell]:
    """Each layout once on its smallest world and once on 4 processes; packing and micro-batches on some."""
    found = []
    for layout in LAYOUTS:
        found += [Cell(layout, world) for world in dict.fromkeys([layout.smallest, 4]) if world in layout.worlds]
        if layout.name in VARIED:
            others = [("1", True), ("auto", True), ("all", False)]
            found += [Cell(layout, layout.smallest, *other) for other in others]
        elif "2" in layout.name.partition(",")[2]:  # rows that ranks share
            found.append(Cell(layout, layout.smallest, packing=True))
    return found


def lacking(settings: str) -> str:
    """Why the catalogue cannot run these settings of a sharding; empty where it can."""
    (name, *keys) = [text.split("=")[0] if index else text.split("=")[1] for index, text in enumerate(settings.split())]
    try:
        offer = installed().find("sharding", name).offer
    except UserError:
        return f"there is no sharding {name}"
    known = {field.name for field in fields(offer.schema)}
    unknown = [key for key in keys if key.removeprefix("sharding.") not in known]
    return f"{name} has no {', '.join(unknown)}" if unknown else ""


def data(folder: Path) -> Path:
    """Rows of GSM8K of mixed lengths, some 90 to 300 tokens, each of which is met once."""
    source = SHARED / "data" / "gsm8k" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    mixed = [row for row in rows if len(row["question"]) + len(row["answer"]) < 420]
    return write_rows(folder / "gsm8k.jsonl", mixed[: STEPS * SIZE])


def settings(rows: Path, precision: str) -> list[str]:
    """The run, whose layout alone changes."""
    model = SHARED / "models" / "stories260k"
    source = ["data=jsonl", f"data.path={rows}", "data.prompt=question", "data.completion=answer"]
    run = [f"steps={STEPS}", f"batch.size={SIZE}", "optimizer.lr=1e-3", f"precision={precision}"]
    return [f"model.path={model}", *source, *run, "tracker=[jsonl]", "guard=[]", "checkpoint.background=false"]


def compared(cell: Cell, found: Outcome, alone: Outcome, precision: str) -> Row:
    """A cell's curves beside those of one process."""
    seen = all(found.series(name) == alone.series(name) for name in ("tokens", "lr"))
    loss, norm = (largest(found.series(name), alone.series(name)) for name in ("loss", "grad_norm"))
    within = loss < LOSS and norm < NORM if precision == "fp32" else loss < BF16_LOSS
    return Row(cell, loss, norm, "" if seen else "other rows", not (seen and within))


def rows(worlds: Worlds, run: Sequence[str], cells: Sequence[Cell], folder: Path, precision: str) -> Iterator[Row]:
    """Runs cell after cell; what the catalogue lacks is skipped. Raises SystemExit where nothing is learned."""
    alone = worlds.train(1, [*run, *Cell(LAYOUTS[0], 1).settings], folder / "alone")
    losses = alone.series("loss")
    print(f"one process: loss {losses[0]:.2f} to {sum(losses[-5:]) / 5:.2f} in {STEPS} steps, {precision}")
    if not sum(losses[-5:]) / 5 < 0.75 * losses[0]:
        raise SystemExit("the loss does not fall: nothing is compared")
    for number, cell in enumerate(cells):
        if reason := lacking(cell.layout.settings):
            yield Row(cell, said=f"skipped: {reason}")
            continue
        try:
            found = worlds.train(cell.world, [*run, *cell.settings], folder / str(number))
            yield compared(cell, found, alone, precision)
        except (Failed, UserError, RuntimeError) as error:
            worlds.of(cell.world).stop()
            yield Row(cell, said=f"failed: {str(error)[:300]}", wrong=True)


HEAD = ("layout", "processes", "micro-batch", "packing", "loss", "gradient norm", "")


def line(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    cell = row.cell
    numbers = ["" if number is None else f"{number:.1e}" for number in (row.loss, row.norm)]
    said = row.said or ("EXCEEDED" if row.wrong else "")
    return (cell.layout.name, str(cell.world), cell.micro, "on" if cell.packing else "off", *numbers, said)


def markdown(found: Sequence[Row], precision: str, asked: str) -> str:
    """The page that is committed."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    bounds = f"loss {LOSS:.0e}, gradient norm {NORM:.0e}" if precision == "fp32" else f"loss {BF16_LOSS:.0e}"
    table = [HEAD, ("---",) * len(HEAD), *map(line, found)]
    described = f"""# Parity, measured

`{asked}` on {date.today().isoformat()}: {versions}, Python {sys.version.split()[0]}, on CPUs.

stories260k learns GSM8K rows of mixed lengths: {STEPS} steps of {SIZE} rows, AdamW with lr 1e-3, {precision}. Each line
is a run of its own. Loss and gradient norm (before clipping) are the largest relative differences from one process over
all steps; the bounds are {bounds}. One unit in the last place at the start gives 4e-7 and 4e-6.

"""
    return described + "".join("| " + " | ".join(cells) + " |\n" for cells in table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the full product instead of a sample")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", default="", help="only layouts whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    asked = parser.parse_args()
    if not (SHARED / "models" / "stories260k").is_dir():
        raise SystemExit(f"{SHARED} is absent; LOOMTUNE_SHARED names the folder of models and data")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cells = [cell for cell in (product() if asked.all else sample()) if asked.only in cell.layout.name]
    began, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LOOMTUNE_CACHE"] = str(folder / "cache")
        worlds = Worlds(folder)
        try:
            run = settings(data(folder), asked.precision)
            widths = [max(18, len(HEAD[0])), *map(len, HEAD[1:])]
            print("  ".join(text.ljust(width) for text, width in zip(HEAD, widths, strict=True)))
            for row in rows(worlds, run, cells, folder, asked.precision):
                found.append(row)
                print("  ".join(t.ljust(w) for t, w in zip(line(row), widths, strict=True)), flush=True)
        finally:
            worlds.stop()
    wrong = sum(row.wrong for row in found)
    print(f"{len(found)} runs in {time.monotonic() - began:.0f} s, {wrong} wrong")
    if asked.write:
        TABLE.write_text(markdown(found, asked.precision, "make parity" + (" ARGS=--all" if asked.all else "")))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
