"""The benchmark's quick run: loomtune against the loop written by hand, on a tiny model and rows made on the spot."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

STEPS = 4


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What one quick run leaves in its JSON file, and the document that it wrote into."""
    folder = tmp_path_factory.mktemp("bench")
    kept, page = folder / "kept.json", folder / "page.md"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    options = ["--quick", "--rounds", "1", "--steps", str(STEPS), "--json", str(kept), "--write", str(page)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOOMTUNE_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "sft.py"), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(kept.read_text()), page.read_text()


def test_both_loops_see_the_same_rows_and_lose_the_same(quick: tuple[dict[str, Any], str]) -> None:
    ours, bare = (quick[0]["measured"][name]["losses"] for name in ("loomtune", "bare loop"))
    assert len(ours) == STEPS
    assert ours == pytest.approx(bare, rel=1e-6)
    assert ours[-1] < ours[0], "nothing was learned"


def test_every_step_is_timed_from_the_end_of_the_one_before(quick: tuple[dict[str, Any], str]) -> None:
    for marks in (rounds[0] for rounds in quick[0]["marks"].values()):
        assert len(marks) == STEPS
        assert all(before["wall"] < after["wall"] for before, after in itertools.pairwise(marks))


def test_the_table_goes_between_the_markers_of_a_page(quick: tuple[dict[str, Any], str]) -> None:
    page = quick[1]
    assert page.startswith("before\n<!-- measured: begin -->\n| contender |")
    assert page.endswith("<!-- measured: end -->\nafter\n")
    assert "old" not in page


def test_a_missed_bar_is_told_from_a_reached_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "benchmarks"))
    from verdict import Measured, bars

    def measured(rate: float, bytes_: float) -> Measured:
        return Measured([1.0], rate, [rate], rate, bytes_)

    names = {"loomtune": (3.5, 39.0), "bare loop": (2.9, 39.0), "TRL as it comes": (1.0, 100.0)}
    rivals = {name: measured(*values) for name, values in names.items()}
    rivals["TRL with packing"] = measured(2.0, 50.0)
    missed = [bar.what for bar in bars(rivals) if not bar.reached]
    assert missed == ["speed against TRL with packing", "speed of the bare loop against TRL as it comes"]
