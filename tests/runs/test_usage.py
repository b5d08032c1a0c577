"""What whole runs use, and what they compute before their first step."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.trackers import metrics
from runs.lagging import LATE, late
from runs.worlds import Outcome, Worlds

Train = Callable[..., Outcome]
slow = pytest.mark.slow

CASES: dict[str, tuple[int, list[str]]] = {
    "adalora with dropout": (2, ["sharding=ddp", "adapter=adalora", "adapter.dropout=0.2"]),
    "fsdp": (2, ["sharding=fsdp", "batch.micro=2"]),
    "zero 3": (2, ["sharding=zero", "sharding.stage=3"]),
    "packed": (1, ["sharding=single", "packing=true", "max_length=64", "batch.sampler=packed"]),
}


@pytest.mark.parametrize(
    "case", [name if name.startswith("adalora") else pytest.param(name, marks=slow) for name in CASES]
)
def test_a_dry_step_leaves_no_trace_in_a_run(tiny: list[str], train: Train, case: str) -> None:
    size, settings = CASES[case]
    plain, dry = (
        train(size, [*tiny, *settings, "steps=3"], f"dry_step={how}", folder=how) for how in ("never", "always")
    )
    assert plain.lines == dry.lines
    assert json.loads((dry.folder / "measured.json").read_text())["dry_step"]["peak_bytes"] is None


def with_usage(settings: list[str]) -> list[str]:
    """The settings of a run that is measured."""
    return [setting for setting in settings if not setting.startswith("tracker")] + ["tracker=[jsonl,usage]"]


def measured(worlds: Worlds, settings: list[str], folder: Path, work: Any = None) -> list[dict[str, Any]]:
    """The lines of a run on two ranks that is measured."""
    hardware = ["hardware.kind=cpu", "hardware.tflops={fp32: 0.1}"]
    worlds.train(2, [*with_usage(settings), *hardware, "sharding=ddp", "steps=3"], folder, work)
    return metrics.read(folder)


def test_steps_say_what_they_used_and_both_ranks_leave_a_trace(worlds: Worlds, tiny: list[str], tmp_path: Path) -> None:
    for line in measured(worlds, [*tiny, "profile.steps=2"], tmp_path / "run"):
        assert {"seconds/data", "seconds/forward", "seconds/backward", "seconds/optimizer"} <= line.keys()
        assert 0 < line["exposed_communication_seconds"] < line["seconds"]
        assert 0 < line["mfu"] < line["mfu_palm"] < 1
    traces = sorted((tmp_path / "run" / "profile").rglob("*.json.gz"))
    assert [path.name for path in traces] == ["rank-0.json.gz", "rank-1.json.gz"]
    for path in traces:
        assert "loomtune backward" in gzip.decompress(path.read_bytes()).decode()


def test_a_rank_that_waits_for_a_late_one_says_so(worlds: Worlds, tiny: list[str], tmp_path: Path) -> None:
    for line in measured(worlds, tiny, tmp_path / "run", late):
        assert line["exposed_communication_seconds"] > 0.7 * LATE


def test_steps_that_cannot_be_traced_are_refused_before_the_run(tiny: list[str]) -> None:
    with pytest.raises(UserError, match=r"profile.steps=12:10 holds no step"):
        api.check(api.compose([*with_usage(tiny), "profile.steps=12:10"], processes=1))
    assert api.compose([*with_usage(tiny), "profile.steps=10:12"], processes=1).root.profile.steps == "10:12"
