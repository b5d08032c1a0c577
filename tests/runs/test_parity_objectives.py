"""Every objective gives one curve in every layout, with real rows, packed or not, prompts shared or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import parity
from parity import ALONE, LEARNED, PLAIN, Cell, Row, compared
from parity_cases import Case, settings, write
from runs.worlds import Outcome, Worlds
from support import shared

EVERYDAY = ("dpo", "fsdp", True)
"""The case, layout and packing of the one run that is made each time; kto and distill have others of their own."""
Alone = Callable[[Case], Outcome]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of every case."""
    shared("models", "stories260k")
    folder = tmp_path_factory.mktemp("parity")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def alone(worlds: Worlds, rows: Path) -> Alone:
    """The run of a case on one process, made once."""
    made: dict[Case, Outcome] = {}

    def of(case: Case) -> Outcome:
        if case not in made:
            cell = replace(ALONE, share="never" if case.answers else "auto")
            made[case] = worlds.train(1, [*settings(case, rows), *cell.settings], rows / case.name)
        return made[case]

    return of


def runs() -> list[object]:
    """Each case under a sample of layouts; all but one only where slow tests are asked for."""
    found = [(case, cell) for case in LEARNED for cell in parity.few(case.answers)]
    names = [(case.name, cell.layout.name, cell.packing) for case, cell in found]
    marks = [() if name == EVERYDAY else pytest.mark.slow for name in names]
    told = [f"{case.name}-{cell.layout.name}-{cell.micro}-{cell.packing}-{cell.share}" for case, cell in found]
    return [pytest.param(*run, marks=mark, id=name) for run, mark, name in zip(found, marks, told, strict=True)]


@pytest.mark.parametrize(("case", "cell"), runs())
def test_one_curve_in_every_layout(
    case: Case, cell: Cell, worlds: Worlds, rows: Path, alone: Alone, tmp_path: Path
) -> None:
    found = worlds.train(cell.world, [*settings(case, rows), *cell.settings], tmp_path / "run")
    row = compared(case, cell, found, alone(case), "fp32")
    assert not row.wrong, parity.line(row)


@pytest.mark.parametrize("answers", [True, False])
def test_the_sample_meets_every_layout_micro_batch_packing_and_sharing(answers: bool) -> None:
    few, every = parity.few(answers), parity.every(answers)
    assert set(few) <= set(every) and len(every) == len(set(every)) == 4 * 3 * 2 * (2 if answers else 1)
    assert {cell.micro for cell in few} == {"1", "2", "auto"}
    shares = {"always", "never"} if answers else {"auto"}
    for layout in PLAIN:
        mine = [cell for cell in few if cell.layout == layout]
        assert {cell.packing for cell in mine} == {True, False}
        assert {cell.share for cell in mine} == shares


def test_a_case_that_exceeds_its_bound_is_wrong() -> None:
    case, cell = LEARNED[0], PLAIN[0]
    lines = [{"tokens": 9, "lr": 0.1, "loss": 1.0, "grad_norm": 2.0, "logps/chosen": -9.0, "logps/rejected": -8.0}]

    def row(**changed: float) -> Row:
        found, alone = Outcome(Path(), {}), Outcome(Path(), {})
        found.__dict__["lines"], alone.__dict__["lines"] = [{**lines[0], **changed}], lines
        return compared(case, Cell(cell, 1), found, alone, "fp32")

    assert not row().wrong and not row(loss=1.000009, grad_norm=2.000019).wrong
    assert row(loss=1.00002).wrong and row(grad_norm=2.00003).wrong
    assert row(**{"logps/rejected": -8.00003}).wrong and row(tokens=8).said == "other rows"


def test_a_page_keeps_the_sections_that_are_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "TABLE", tmp_path / "page.md")
    for name, text in (("kto", "one"), ("Memory", "two"), ("dpo", "three"), ("kto", "four")):
        parity.TABLE.write_text(parity.page({name: f"\n{text}\n"}))
    said = parity.TABLE.read_text().split("\n## ")
    assert said[0].startswith("# Parity") and said[1:] == ["dpo\n\nthree\n", "kto\n\nfour\n", "Memory\n\ntwo\n"]
