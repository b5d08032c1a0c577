"""A sample of what `make matrix` runs, and that its page is of the matrix as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from matrix import Bench, built_in, known, name_of, partner, row
from runs.worlds import Worlds

CELLS = {name_of(cell): cell for cell in built_in()}
WORKING = [cell for cell in CELLS.values() if cell.status == "works"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, worlds: Worlds) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"), worlds)


SAMPLE = [
    ("sft x full x fsdp tensor", "sft x full x zero stage 3"),
    ("sft x lora x fsdp sequence", "sft x lora x single"),
    ("sft x lora x zero stage 2", "sft x lora x fsdp hsdp"),
    ("sft x prefix x zero stage 3", "sft x prefix x fsdp"),
]


@pytest.mark.parametrize(("name", "other"), SAMPLE)
def test_what_is_said_to_work_trains_moves_and_is_exported(name: str, other: str, bench: Bench) -> None:
    measured = bench.measure(CELLS[name], CELLS[other])
    assert not measured.fault


def test_every_cell_is_moved_to_another_and_every_other_is_reached() -> None:
    moves = {name_of(cell): name_of(partner(cell, WORKING)) for cell in WORKING}
    assert all(cell != other for cell, other in moves.items())
    assert set(moves.values()) == set(moves)


def test_the_page_holds_the_matrix_as_it_is_and_nothing_that_failed() -> None:
    rows = known()
    assert [" x ".join(names) for names in rows] == list(CELLS)
    for cell, found in zip(CELLS.values(), rows.values(), strict=True):
        verdict, *measured = found[4:]
        assert verdict == row(cell)[4]
        assert all(measured) if cell.status == "works" else not any(measured)


def test_a_row_outside_its_bounds_says_so(bench: Bench, tmp_path: Path) -> None:
    from dataclasses import replace

    from matrix import Measured

    (cell, *_) = WORKING
    fine = Measured((1e-7, 1e-7), cell, (1e-7, 1e-7), 1e-7)
    assert not fine.fault
    for change in ({"first": (3e-6, 0.0)}, {"resumed": (0.0, 2e-5)}, {"exported": float("nan")}):
        assert row(cell, replace(fine, **change))[4].startswith("EXCEEDED: ")
