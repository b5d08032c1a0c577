"""One training run of each objective under shardings, world sizes, micro-batches and packing, compared: `make parity`.

The maths never depends on the machine: what is printed is how far the curves are from those of one process. By default
a fair sample runs, of supervised fine-tuning each layout on its smallest world and on 4 processes; `--all` runs all
combinations. Ends with 1 where a bound is exceeded. To add a layout, add a line to `LAYOUTS`; an objective, one to
`parity_cases.LEARNED`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

from loomtune.catalogue import installed
from loomtune.errors import UserError
from parity_cases import LEARNED, MODEL, SFT, SIZE, Case, settings, write
from runs.curves import NORM, largest
from runs.worlds import Failed, Outcome, Worlds
from support import ROOT

BF16_LOSS = 5e-3
SEEN = 2e-6
"""Bound of mean log-probabilities, and of what else a case logs."""
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
MICRO = {"1": "1", "2": "2", "auto": "auto", "all": str(SIZE)}
VARIED = ("single", "fsdp", "zero 3")
"""Layouts of which the sample also has other micro-batches."""

PLAIN = tuple(layout for layout in LAYOUTS if layout.name in ("single", "ddp", "fsdp", "zero 3"))
CASES = (SFT, *LEARNED)


@dataclass(frozen=True)
class Cell:
    """One run of the product. micro: a key of `MICRO`. share: whether answers share their prompt's computation."""

    layout: Layout
    world: int
    micro: str = "auto"
    packing: bool = False
    share: str = "auto"

    @property
    def settings(self) -> list[str]:
        """As typed."""
        how = [f"batch.micro={MICRO[self.micro]}", f"packing={str(self.packing).lower()}", f"batch.share={self.share}"]
        return [*self.layout.settings.split(), *how]


ALONE = Cell(LAYOUTS[0], 1, "all")


@dataclass(frozen=True)
class Row:
    """What came of a cell: the largest relative differences, or why there are none. seen: of a case's own means."""

    cell: Cell
    loss: float | None = None
    norm: float | None = None
    seen: float | None = None
    said: str = ""
    wrong: bool = False


def product() -> list[Cell]:
    """Every layout on every world, with every micro-batch, packed and not."""
    worlds = [(layout, world) for layout in LAYOUTS for world in layout.worlds]
    return [
        Cell(*place, micro, packing) for place in worlds for micro in ("1", "auto", "all") for packing in (False, True)
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


def few(answers: bool) -> list[Cell]:
    """A sample of `every`: each layout packed and not, shared and not, and every micro-batch."""
    shares = ("always", "never") if answers else ("auto", "auto")
    single, ddp, fsdp, zero = (Cell(layout, layout.smallest) for layout in PLAIN)
    varied = [
        replace(single, micro="1", share=shares[1]),
        replace(single, micro="2", packing=True),
        replace(single, packing=True, share=shares[1]),
        single,
        ddp,
        replace(ddp, micro="1", packing=True, share=shares[1]),
        replace(fsdp, micro="2", share=shares[1]),
        replace(fsdp, packing=True),
        zero,
        replace(zero, micro="2", packing=True, share=shares[1]),
    ]
    return [replace(cell, share=shares[0]) if cell.share == "auto" else cell for cell in varied]


def every(answers: bool) -> list[Cell]:
    """What other objectives than `sft` are run under with `--all`."""
    return [
        Cell(layout, layout.smallest, micro, packing, share)
        for layout in PLAIN
        for micro in ("1", "2", "auto")
        for packing in (False, True)
        for share in (("always", "never") if answers else ("auto",))
    ]


def cells(case: Case, whole: bool) -> list[Cell]:
    """Those of a case."""
    if case is SFT:
        return product() if whole else sample()
    return every(case.answers) if whole else few(case.answers)


def compared(case: Case, cell: Cell, found: Outcome, alone: Outcome, precision: str) -> Row:
    """A cell's curves beside those of one process."""
    same = all(found.series(name) == alone.series(name) for name in ("tokens", "lr"))
    loss, norm = (largest(found.series(name), alone.series(name)) for name in ("loss", "grad_norm"))
    seen = max((spread(found.series(name), alone.series(name)) for name in case.seen), default=None)
    within = loss < case.loss and norm < NORM and (seen or 0) < SEEN if precision == "fp32" else loss < BF16_LOSS
    return Row(cell, loss, norm, seen, "" if same else "other rows", not (same and within))


def spread(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """The largest difference of two curves that may come near 0, relative to the largest value. None: of nothing."""
    assert [value is None for value in ours] == [value is None for value in theirs]
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    assert both, "nothing was seen"
    return max(abs(a - b) for a, b in both) / (max(abs(b) for _, b in both) or 1.0)


def rows(worlds: Worlds, case: Case, asked: Sequence[Cell], folder: Path, precision: str) -> Iterator[Row]:
    """Runs cell after cell; what the catalogue lacks is skipped. Raises SystemExit where nothing is learned."""
    run, folder = [*settings(case, folder), f"precision={precision}"], folder / case.name.replace(" ", "-")
    alone = worlds.train(1, [*run, *replace(ALONE, share="never" if case.answers else "auto").settings], folder)
    losses = alone.series("loss")
    print(f"one process: loss {losses[0]:.3f} to {sum(losses[-5:]) / 5:.3f} in {case.steps} steps, {precision}")
    if case is SFT and not sum(losses[-5:]) / 5 < 0.75 * losses[0]:
        raise SystemExit("the loss does not fall: nothing is compared")
    for number, cell in enumerate(asked):
        if reason := lacking(cell.layout.settings):
            yield Row(cell, said=f"skipped: {reason}")
            continue
        try:
            found = worlds.train(cell.world, [*run, *cell.settings], folder.with_name(f"{folder.name}-{number}"))
            yield compared(case, cell, found, alone, precision)
        except (Failed, UserError, RuntimeError) as error:
            worlds.of(cell.world).stop()
            yield Row(cell, said=f"failed: {str(error)[:300]}", wrong=True)


HEAD = ("layout", "processes", "micro-batch", "packing", "shared", "loss", "gradient norm", "means", "")


def line(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    cell = row.cell
    numbers = ["" if number is None else f"{number:.1e}" for number in (row.loss, row.norm, row.seen)]
    said = row.said or ("EXCEEDED" if row.wrong else "")
    place = (cell.layout.name, str(cell.world), cell.micro, "on" if cell.packing else "off")
    return (*place, {"always": "yes", "never": "no"}.get(cell.share, ""), *numbers, said)


def section(case: Case, found: Sequence[Row], precision: str, asked: str) -> str:
    """What the page says of a case."""
    bounds = f"loss {case.loss:.0e}, gradient norm {NORM:.0e}" if precision == "fp32" else f"loss {BF16_LOSS:.0e}"
    if case.seen and precision == "fp32":
        bounds += f", means {SEEN:.0e} ({', '.join(case.seen)})"
    told = (
        f"`{asked}` on {date.today().isoformat()}; `{case.settings}`, {case.steps} steps of {SIZE} rows, {precision}."
    )
    table = [HEAD, ("---",) * len(HEAD), *map(line, found)]
    said = [told, f"Bounds: {bounds}.", *([case.why] if case.why else [])]
    return "\n".join(["", *said, "", *("| " + " | ".join(texts) + " |" for texts in table), ""])


def page(made: Mapping[str, str]) -> str:
    """The page with new sections in the place of those of the same name; others stay as they are."""
    kept = re.split(r"^## (.+)\n", TABLE.read_text(), flags=re.MULTILINE) if TABLE.exists() else [""]
    known = dict(zip(kept[1::2], kept[2::2], strict=True))
    told = {**known, **made}
    order = dict.fromkeys([case.name for case in CASES if case.name in told]) | dict.fromkeys(told)
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    head = INTRODUCTION.format(versions=versions, python=sys.version.split()[0])
    return head + "".join(f"\n## {name}\n{told[name].rstrip()}\n" for name in order)


INTRODUCTION = """# Parity, measured

{versions}, Python {python}, on CPUs.

stories260k learns rows of mixed lengths, each met once, with AdamW: GSM8K's, and for other objectives than `sft` the
ranked answers of Open Assistant's conversations, cut to 100 tokens. Each line is a run of its own. Loss and gradient
norm (before clipping) are the largest relative differences from one process over all steps; of means that are logged
beside the loss and may come near 0, the largest difference is relative to the largest value. The one process computes
whole steps in one micro-batch, nothing packed and no prompt shared. One unit in the last place at the start of `sft`
gives 4e-7 and 4e-6.
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the full product instead of a sample")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--case", default="", help="only cases whose names begin so, such as dpo,kto")
    parser.add_argument("--only", default="", help="only layouts whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"renew the sections in {TABLE.relative_to(ROOT)}")
    asked = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is absent; LOOMTUNE_SHARED names the folder of models and data")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    began = time.monotonic()
    found: dict[Case, list[Row]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LOOMTUNE_CACHE"] = str(folder / "cache")
        worlds = Worlds(folder)
        try:
            write(folder)
            widths = [max(18, len(HEAD[0])), *map(len, HEAD[1:])]
            for case in (case for case in CASES if case.name.startswith(tuple(asked.case.split(",")))):
                print(
                    f"\n{case.name}\n" + "  ".join(text.ljust(width) for text, width in zip(HEAD, widths, strict=True))
                )
                chosen = [cell for cell in cells(case, asked.all) if asked.only in cell.layout.name]
                found[case] = []
                for row in rows(worlds, case, chosen, folder, asked.precision):
                    found[case].append(row)
                    print("  ".join(t.ljust(w) for t, w in zip(line(row), widths, strict=True)), flush=True)
        finally:
            worlds.stop()
    every_row = [row for made in found.values() for row in made]
    wrong = sum(row.wrong for row in every_row)
    print(f"{len(every_row)} runs in {time.monotonic() - began:.0f} s, {wrong} wrong")
    if asked.write:
        said = "make parity" + (" ARGS=--all" if asked.all else "")
        TABLE.write_text(page({case.name: section(case, made, asked.precision, said) for case, made in found.items()}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
