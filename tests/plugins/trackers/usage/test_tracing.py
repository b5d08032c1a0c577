"""Traces of single steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import profile

from loomtune.events import Events
from loomtune.loop import Loop
from loomtune_plugins.trackers.settings import UsageSettings
from loomtune_plugins.trackers.usage import measuring
from loomtune_plugins.trackers.usage.tracing import exposed
from loomtune_plugins.trackers.usage.tracker import Usage
from toys import Toy, made


def trained(folder: Path, asked: str, **parts: Any) -> Toy:
    """A run with the tracker, to its end."""
    one = made(folder, events=Events([("usage", Usage(UsageSettings()))]), **parts)
    run = one.run
    run.settings.profile.steps = asked
    one.assembly.build_roles()
    one.assembly.keeper.restore()
    run.events.tell("model_ready", run=run)
    status = Loop(run, one.assembly.keeper).train()
    run.events.tell("run_finished", run=run, status=status)
    return one


def traced(folder: Path) -> list[str]:
    """Names of the phases' ranges in the one trace of a run, in order of time."""
    (path,) = [found for found in (folder / "profile").rglob("*") if found.is_file()]
    assert path.name == "rank-0.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ranges = [(one["ts"], one["name"]) for one in events if str(one.get("name")).startswith("loomtune ")]
    return [name.removeprefix("loomtune ") for _, name in sorted(ranges)]


A_STEP = ["data", "data", "forward", "forward", "backward", "forward", "backward", "optimizer"]


def test_the_steps_that_are_asked_for_are_traced_with_their_phases(tmp_path: Path) -> None:
    one = trained(tmp_path, "2:3", every=2)
    assert traced(tmp_path) == [*A_STEP, "checkpoint", *A_STEP]
    assert (tmp_path / "profile" / one.run.attempt).is_dir()


def test_a_resumed_run_traces_what_is_left_of_them_in_a_folder_of_its_own(tmp_path: Path) -> None:
    trained(tmp_path, "", stop_after=2)
    trained(tmp_path, "2:3")
    assert traced(tmp_path) == A_STEP


def test_a_run_that_ends_sooner_keeps_what_it_has(tmp_path: Path) -> None:
    trained(tmp_path, "2:9", steps=2)
    assert traced(tmp_path)[: len(A_STEP)] == A_STEP


@pytest.mark.parametrize(("asked", "parts"), [("9", {}), ("1", {"before": 2})])
def test_steps_that_this_attempt_does_not_take_are_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, parts: dict[str, int]
) -> None:
    if parts:
        trained(tmp_path, "", stop_after=parts["before"])
    trained(tmp_path, asked)
    assert f"profile.steps={asked}: this attempt goes from step" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_a_trace_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    plain, one = (trained(tmp_path / (asked or "none"), asked) for asked in ("", "1:2"))
    assert [line["loss"] for line in plain.diary.steps] == [line["loss"] for line in one.diary.steps]


def test_a_disk_that_is_full_costs_the_trace_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(profile, "export_chrome_trace", full)
    one = trained(tmp_path, "2")
    assert one.run.step == 4
    assert "rank 0 keeps no trace: OSError: No space left" in capsys.readouterr().err
    assert not list(tmp_path.rglob("rank-0.json.gz"))


def test_communication_is_exposed_where_nothing_is_computed() -> None:
    communication = [(0.0, 4.0), (3.0, 5.0), (8.0, 9.0)]
    assert exposed(communication, [(1.0, 2.0), (4.5, 6.0)]) == (1 + 2.5) + 1
    assert exposed(communication, []) == 6
    assert exposed(communication, [(0.0, 10.0)]) == 0
    assert exposed([], [(0.0, 1.0)]) == 0


def test_without_being_asked_nothing_listens_but_the_clock(tmp_path: Path) -> None:
    one = trained(tmp_path, "")
    (listener,) = one.run.phases.listeners
    assert isinstance(listener, measuring.Measuring)
