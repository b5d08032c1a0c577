"""Quick runs of the benchmarks, on a tiny model and rows made on the spot: what is raced, timed and said at the end."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

STEPS = 4


Run = tuple[dict[str, Any], str]
"""What a quick run leaves in its JSON file, and the document that it wrote into."""


def run(script: str, markers: str, folder: Path) -> Run:
    kept, page = folder / "kept.json", folder / "page.md"
    page.write_text(f"before\n<!-- {markers}: begin -->\nold\n<!-- {markers}: end -->\nafter\n")
    options = ["--quick", "--rounds", "1", "--steps", str(STEPS), "--json", str(kept), "--write", str(page)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOOMTUNE_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(kept.read_text()), page.read_text()


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("sft.py", "measured", tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("dpo.py", "dpo", tmp_path_factory.mktemp("dpo"))


def test_both_loops_see_the_same_rows_and_lose_the_same(sft: Run) -> None:
    ours, bare = (sft[0]["measured"][name]["said"]["loss"] for name in ("loomtune", "bare loop"))
    assert len(ours) == STEPS
    assert ours == pytest.approx(bare, rel=1e-6)
    assert ours[-1] < ours[0], "nothing was learned"


def test_every_step_is_timed_from_the_end_of_the_one_before(sft: Run) -> None:
    for marks in (rounds[0] for rounds in sft[0]["marks"].values()):
        assert len(marks) == STEPS
        assert all(before["wall"] < after["wall"] for before, after in itertools.pairwise(marks))


def test_the_table_goes_between_the_markers_of_a_page(sft: Run) -> None:
    page = sft[1]
    assert page.startswith("before\n<!-- measured: begin -->\n| contender |")
    assert page.endswith("<!-- measured: end -->\nafter\n")
    assert "old" not in page


def test_pairs_are_preferred_alike_whether_their_prompt_is_computed_once_or_twice(dpo: Run) -> None:
    once, twice = (one["said"] for one in dpo[0]["measured"].values())
    assert once["loss"][0] == pytest.approx(math.log(2), rel=1e-5), "the policy began as its reference"
    assert once["loss"][-1] < once["loss"][0], "nothing was learned"
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        assert once[name] == pytest.approx(twice[name], rel=1e-5)


def test_a_missed_bar_is_told_from_a_reached_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "benchmarks"))
    from sft import bars
    from verdict import Measured

    def measured(rate: float, bytes_: float) -> Measured:
        return Measured({"loss": [1.0]}, rate, [rate], rate, bytes_)

    names = {"loomtune": (3.5, 39.0), "bare loop": (2.9, 39.0), "TRL as it comes": (1.0, 100.0)}
    rivals = {name: measured(*values) for name, values in names.items()}
    rivals["TRL with packing"] = measured(2.0, 50.0)
    missed = [bar.what for bar in bars(rivals) if not bar.reached]
    assert missed == ["speed against TRL with packing", "speed of the bare loop against TRL as it comes"]


def test_pairs_are_judged_by_the_widest_difference_of_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "benchmarks"))
    from dpo import APART, PATCHED, bars
    from verdict import Measured

    def measured(rate: float, bytes_: float, norm: float = 2.0) -> Measured:
        steps = {
            "loss": [0.7, 0.6],
            "grad_norm": [1.0, norm],
            "logps/chosen": [-9.0, -8.0],
            "logps/rejected": [-9.0, -9.0],
        }
        return Measured(steps, rate, [rate], rate, bytes_)

    rivals = {"loomtune": measured(4.0, 44.0), APART: measured(3.9, 44.0)}
    rivals |= {"TRL as it comes": measured(1.0, 100.0), PATCHED: measured(2.5, 90.0, norm=2.001)}
    missed = [bar.what for bar in bars(rivals) if not bar.reached]
    assert missed == [f"largest relative difference of grad_norm from {PATCHED}", f"speed against {PATCHED}"]
