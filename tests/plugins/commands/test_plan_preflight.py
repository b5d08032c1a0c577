"""A run that will not fit is refused before it is launched, with what would make it fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.plan import Plan, estimates
from loomtune_plugins.commands.plan import preflight
from loomtune_plugins.commands.plan.child import answer
from loomtune_plugins.commands.plan.foreseen import Oracle
from loomtune_plugins.commands.plan.remedies import moves
from loomtune_plugins.commands.plan.worlds import World
from plans import plant

WORDS = ["recipe=llama3_70b_full_fsdp", "data.path=rows.jsonl"]
TOO_MUCH = {"what": "this run will not fit: a rank needs 90.0 GiB", "cure": "sharding.offload=true", "fatal": True}


def composed(*words: str, processes: int = 8) -> Plan:
    hardware = [] if any(word.startswith("hardware=") for word in words) else ["hardware=h100_80gb"]
    return api.compose([*WORDS, *hardware, *words], processes=processes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Those that a child was asked about, which says that they do not fit."""
    found: list[Plan] = []

    def child(plan: Plan, remedies: float) -> dict[str, Any]:
        found.append(plan)
        return {"memory": {"peak_bytes": 90}, "refusal": TOO_MUCH, "estimates": [["peak memory", 90.0, "bytes", "why"]]}

    monkeypatch.setattr(preflight, "_asked", child)
    return found


def test_what_will_not_fit_is_refused_and_nothing_of_the_run_is_made(asked: list[Plan], tmp_path: Path) -> None:
    (found,) = preflight.foresee(composed(), tmp_path / "run")
    assert found.fatal and "90.0 GiB" in found.what
    assert "sharding.offload=true" in found.cure and "hardware.refuse=false" in found.cure
    assert not (tmp_path / "run").exists()


def test_told_to_it_only_warns_and_leaves_what_it_foresaw(asked: list[Plan], tmp_path: Path) -> None:
    plan = composed("hardware.refuse=false")
    (found,) = preflight.foresee(plan, tmp_path / "run")
    assert not found.fatal and "refuse" not in found.cure
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["memory"] == {"peak_bytes": 90}
    preflight.foresee(plan, tmp_path / "run")
    assert len(asked) == 1, "the same run is looked at once"
    preflight.foresee(composed("hardware.refuse=false", "max_length=2048"), tmp_path / "run")
    assert len(asked) == 2


def test_nothing_is_looked_at_where_no_hardware_is_named(asked: list[Plan], tmp_path: Path) -> None:
    assert preflight.foresee(composed("hardware=null"), tmp_path) == []
    assert preflight.estimate(composed("hardware=null")) == []
    assert asked == []


def test_training_asks_before_it_makes_anything(asked: list[Plan], tmp_path: Path) -> None:
    words = ["hardware=h100_80gb", "launcher.procs=1", "steps=1", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="will not fit") as refused:
        api.train(words)
    assert refused.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_estimates(asked: list[Plan]) -> None:
    (one,) = [one for one in estimates(composed(), installed()) if one.subject == "peak memory"]
    assert (one.value, one.unit, one.reasoning) == (90.0, "bytes", "why")


def test_one_that_breaks_lets_the_run_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(plan: Plan, remedies: float) -> dict[str, Any]:
        raise RuntimeError("out of luck")

    from loomtune.plan import foreseen

    monkeypatch.setattr(preflight, "_asked", broken)
    (found,) = foreseen(composed(), tmp_path, installed())
    assert not found.fatal and "out of luck" in found.what


def test_the_child_says_by_how_much_of_what_and_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    plan = composed("batch.micro=2", "launcher.procs=8", "sharding.activation_checkpointing=false")
    refused = answer({"plan": plan.dump(), "per_node": 8, "remedies": 1000})["refusal"]
    assert "of optimizer" not in refused["what"] and "GiB and has 79.1" in refused["what"]
    assert "optimizer" in refused["what"] and "too few" in refused["what"]
    assert "sharding.offload=true" in refused["cure"]
    assert refused["cure"].count("GiB") <= 3


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    said = answer({"plan": composed("batch.micro=2", processes=64).dump(), "per_node": 8, "remedies": 0})
    assert said["refusal"] is None and said["fits"] is True
    assert {"peak memory of a rank", "time of a step"} <= {subject for subject, *_ in said["estimates"]}


WHOLE = ["sharding.accumulate_sharded=false"]
"""Gradients stay whole until a step's last micro-batch."""


def test_changes_are_tried_from_the_cheapest_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    plan = composed("batch.micro=4", "sharding.activation_checkpointing=false", "sharding.replicate=2", *WHOLE)
    labels = [move.label for move in moves(Oracle(plan, World(8, 8)).plan, World(8, 8))]
    assert labels[:4] == [
        "batch.micro=2",
        "batch.micro=1",
        "sharding.activation_checkpointing=true",
        "sharding.accumulate_sharded=true",
    ]
    assert (
        labels.index("sharding.replicate=1") < labels.index("launcher.nodes=2") < labels.index("sharding.offload=true")
    )
    assert labels[-1] == "launcher.nodes=4"


def test_the_launching_process_imports_no_torch() -> None:
    code = (
        "import sys, loomtune_plugins.commands, loomtune_plugins.commands.plan.preflight; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_a_run_that_will_not_fit_is_refused_in_earnest(tmp_path: Path) -> None:
    words = ["model=llama_1m", "max_length=256", "sharding=ddp", "launcher.procs=2", "batch.micro=4", "batch.size=8"]
    small = ["hardware=h100_80gb", "hardware.memory_gib=0.02", "steps=1", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="will not fit") as refused:
        api.train([*words, *small])
    assert "batch.micro" in str(refused.value) or "checkpointing" in str(refused.value)
