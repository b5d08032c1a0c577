"""The chain of runs behind docs/preferences.md: what begins from what, and what the tables say of it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loomtune import api
from loomtune.plan import Plan
from support import ROOT

PLACE = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("preferences_bench", PLACE / "preferences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLACE))
        patch.setitem(sys.modules, "preferences_bench", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def asked(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """As typed, with models where those of the student and of each stage are looked for."""
    out = tmp_path_factory.mktemp("out")
    for folder in (bench.SMALL, *(f"{stage.name}-7" for stage in bench.STAGES)):
        bench.make_small(out / folder)
    return argparse.Namespace(out=out, questions=600, seeds=[0, 7], only="")


@pytest.fixture(scope="module")
def plans(bench: ModuleType, asked: argparse.Namespace) -> dict[str, Plan]:
    """Of every stage."""
    return {stage.name: chains(bench).Job(stage, 7, asked).plan() for stage in bench.STAGES}


def chains(bench: ModuleType) -> ModuleType:
    """What other chains of runs have in common with these."""
    return sys.modules[bench.Chain.__module__]


def end(bench: ModuleType, asked: argparse.Namespace, stage: str, **metrics: float) -> Path:
    """Writes what a finished run leaves."""
    job = next(chains(bench).Job(one, 7, asked) for one in bench.STAGES if one.name == stage)
    job.folder.mkdir(exist_ok=True)
    (job.folder / "run.yaml").write_text(job.plan().dump())
    result = {"status": "completed", "step": 1, "metrics": metrics, "error": None}
    (job.folder / "result.json").write_text(json.dumps(result))
    return Path(job.folder)


def test_every_stage_passes_the_checks_of_a_run_and_has_its_seeds_questions(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        assert api.check(plan) == []
        data = plan.chosen("data")
        assert (plan.root.seed, data["seed"], data["test"]) == (7, 7, 600)
    assert len({plan.hash for plan in plans.values()}) == len(plans)


def test_controls_differ_from_what_they_control_in_what_is_learned_alone(plans: dict[str, Plan]) -> None:
    for method, control in (("dpo", "longer"), ("distill", "alone")):
        one, other = plans[method].maths, plans[control].maths
        assert {key for key in one | other if one.get(key) != other.get(key)} <= {"objective", "loss", "roles"}


def test_the_student_is_the_shipped_model_without_its_last_layer(bench: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from loomtune_plugins.models.folders import TINY

    bench.make_small(tmp_path)
    small, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path, TINY))
    lost = {name for name in whole if name.startswith("model.layers.3.")}
    assert lost and small.keys() == whole.keys() - lost
    assert all(bool((weight == whole[name]).all()) for name, weight in small.items())
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == bench.LAYERS == 3


def test_tables_say_what_there_is_and_what_was_not_run(bench: ModuleType, asked: Any) -> None:
    end(bench, asked, "sft", sql_accuracy=0.6)
    end(bench, asked, "reward", heldout_accuracy=0.925)
    dpo, reward, distilled = bench.CHAIN.written(asked)
    assert "| 7 | 60.0% | not run |" in dpo and "| mean | not run |" in dpo, "no mean of some seeds"
    assert "| 0 | not run |\n| 7 | 92.5% |\n| mean | not run |" in reward
    assert "| 7 | 60.0% | not run |" in distilled
    one = argparse.Namespace(**{**vars(asked), "seeds": [7]})
    assert "| mean | 92.5% |" in list(bench.CHAIN.written(one))[1]


def test_a_run_with_other_settings_does_not_count(bench: ModuleType, asked: Any) -> None:
    end(bench, asked, "reward", heldout_accuracy=0.925)
    other = argparse.Namespace(**{**vars(asked), "questions": 700})
    assert "92.5%" in "".join(bench.CHAIN.written(asked)) and "92.5%" not in "".join(bench.CHAIN.written(other))


def test_settings_that_came_after_a_run_do_not_undo_it(bench: ModuleType) -> None:
    assert chains(bench).agree({"steps": 3, "data": {"a": 1}}, {"steps": 3, "data": {"a": 1, "new": 2}, "more": {}})
    assert not chains(bench).agree({"data": {"a": 1}}, {"data": {"a": 2}})


def test_the_page_has_the_place_that_is_written(bench: ModuleType, tmp_path: Path) -> None:
    page, before = tmp_path / "page.md", bench.CHAIN.page.read_text()
    page.write_text(before)
    chains(bench).insert(page, "what was found\n", bench.CHAIN.markers)
    begin, end = (before.index(f"<!-- {bench.CHAIN.markers}: {which} -->") for which in ("begin", "end"))
    said = f"<!-- {bench.CHAIN.markers}: begin -->\nwhat was found\n"
    assert page.read_text() == before[:begin] + said + before[end:]
