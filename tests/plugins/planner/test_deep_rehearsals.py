"""A deep model, continued from shallow rehearsals, against all of its blocks."""

from __future__ import annotations

import pytest

from loomtune_plugins.planner.rehearse import rehearse
from rehearsing import planned


@pytest.mark.parametrize("sharding", ["single", "fsdp"])
def test_continued_is_what_all_blocks_show(sharding: str) -> None:
    plan = planned(f"sharding={sharding}", "model.shape.num_hidden_layers=12")
    processes = 1 if sharding == "single" else 4
    whole, made = (rehearse(plan, processes, whole=every) for every in (True, False))
    assert made.notes == ("continued from 3, 5, 8 blocks",)
    assert made.peak.bytes == pytest.approx(whole.peak.bytes, rel=0.001)
    assert made.kept == pytest.approx(whole.kept, rel=0.001)
    assert made.parameters == whole.parameters
    for what in ("collectives", "work"):
        one, other = (sum(each.bytes * each.count for each in getattr(trace, what)) for trace in (made, whole))
        assert one == pytest.approx(other, rel=0.001)
