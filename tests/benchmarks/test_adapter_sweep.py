"""What the sweep of adapters chooses, and that it leaves none of them out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loomtune.catalogue import BUILT_IN_DISTRIBUTION, installed
from support import ROOT

PLACE = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    """The script as a module: by a name of its own, for `tests/adapters.py` has the other."""
    spec = importlib.util.spec_from_file_location("adapter_sweep", PLACE / "adapters.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLACE))
        patch.setitem(sys.modules, "adapter_sweep", module)
        spec.loader.exec_module(module)
    return module


def result(validation: float | None, accuracy: float, status: str = "completed") -> dict[str, Any]:
    return {"status": status, "validation": validation, "sql_accuracy": accuracy, "before": 0.1}


def test_every_built_in_adapter_is_swept_under_a_label_of_its_own(sweep: ModuleType) -> None:
    built_in = {e.offer.name for e in installed().entries("adapter") if e.source.distribution == BUILT_IN_DISTRIBUTION}
    assert {swept.name for swept in sweep.SWEPT} == built_in
    assert len({swept.label for swept in sweep.SWEPT}) == len(sweep.SWEPT)
    rates = {swept.label: swept.rates for swept in sweep.SWEPT}
    assert all(len(set(tried)) == len(tried) for tried in rates.values())
    assert len(rates["full"]) > 2 < len(rates["lora, rank 16"])


def test_the_rate_is_chosen_by_validation_alone_of_runs_that_ended(sweep: ModuleType) -> None:
    tried = [("low", result(0.3, 0.4)), ("right", result(0.5, 0.2)), ("high", result(0.9, 0.9, "failed"))]
    assert sweep.best(tried)[0] == "right"
    assert sweep.best([("none", result(None, 0.9))]) is None


def test_the_gain_is_a_share_of_what_full_fine_tuning_added(sweep: ModuleType) -> None:
    assert sweep.gain(result(0.3, 0.64), result(0.3, 0.7)) == "90%"
    assert sweep.gain(result(0.3, 0.64), result(0.3, 0.1)) == ""


def test_a_run_that_is_there_is_not_run_again_and_another_hash_is(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = SimpleNamespace(questions=10, steps=2, seed=0, out=tmp_path)
    trial = sweep.Trial.of(sweep.SWEPT[0], 1e-3, asked)
    started: list[list[str]] = []
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **more: started.append(command))
    assert "ended without a result" in trial.run() and len(started) == 1
    assert f"run.dir='{trial.folder}'" in started[0] and "optimizer.lr=0.001" in started[0]
    trial.folder.mkdir()
    (trial.folder / "run.yaml").write_text(trial.plan.dump())
    (trial.folder / "result.json").write_text('{"status": "completed", "step": 2, "metrics": {}, "error": null}')
    assert "completed" in trial.run() and len(started) == 1
    other = sweep.Trial.of(sweep.SWEPT[0], 2e-3, asked)
    assert other.folder != trial.folder and other.result() is None


def test_the_page_has_the_place_that_is_written(sweep: ModuleType, tmp_path: Path) -> None:
    page, before = tmp_path / "page.md", sweep.PAGE.read_text()
    page.write_text(before)
    sweep.insert(page, "what was found\n", sweep.MARKERS)
    begin, end = (before.index(f"<!-- {sweep.MARKERS}: {which} -->") for which in ("begin", "end"))
    said = f"<!-- {sweep.MARKERS}: begin -->\nwhat was found\n"
    assert page.read_text() == before[:begin] + said + before[end:]
