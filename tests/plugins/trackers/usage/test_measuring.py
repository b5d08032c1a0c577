"""The numbers that a step gets beside its loss."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loomtune.loop import Loop
from loomtune.testing import check_tracker
from loomtune_plugins.trackers.settings import UsageSettings
from loomtune_plugins.trackers.usage import measuring
from loomtune_plugins.trackers.usage.clocks import HostClock, slept
from loomtune_plugins.trackers.usage.measuring import Measuring, Memory
from loomtune_plugins.trackers.usage.timeline import STEP
from loomtune_plugins.trackers.usage.tracker import Usage
from loomtune_plugins.trackers.usage.worth import Amount, Passes
from toys import Plain, made


def measured(folder: Path, **parts: Any) -> list[dict[str, float]]:
    """The metrics of each step of a run that is measured."""
    one, lines = made(folder, **parts), list[dict[str, float]]()
    one.assembly.build_roles()
    one.run.phases.listeners.append(Measuring(one.run))
    tell = one.run.events.tell

    def told(event: str, **arguments: Any) -> None:
        if event == "step_finished":
            lines.append(dict(arguments["metrics"]))
        tell(event, **arguments)

    one.run.events.tell = told  # type: ignore[method-assign]
    Loop(one.run, one.assembly.keeper).train()
    return lines


class Slow(Plain):
    """Computes for 40 ms in each forward pass."""

    def loss(self, *given: Any) -> Any:
        until = time.thread_time() + 0.04
        while time.thread_time() < until:
            pass
        return super().loss(*given)


def test_phases_add_up_to_the_steps_seconds(tmp_path: Path) -> None:
    shares = []
    for line in measured(tmp_path, objective=Slow(), steps=5):
        parts = sum(line[f"seconds/{phase}"] for phase in STEP if f"seconds/{phase}" in line)
        assert parts <= line["seconds"]
        assert line["seconds/forward"] > 0.3 * parts
        shares.append(parts / line["seconds"])
    assert sorted(shares)[2] > 0.93, "of most steps; a busy machine may stop any of them between two lines"


def test_a_checkpoint_counts_with_the_step_after_it(tmp_path: Path) -> None:
    with_it = ["seconds/checkpoint" in line for line in measured(tmp_path, every=2)]
    assert with_it == [False, False, True, False]


def test_alone_nobody_is_waited_for_and_no_peak_is_made_up(tmp_path: Path) -> None:
    assert not {measuring.EXPOSED, "mfu", "mfu_palm"} & measured(tmp_path)[0].keys()


def test_tokens_of_prompts_count_too(tmp_path: Path) -> None:
    line = measured(tmp_path, texts=["reed", "loom"])[0]
    assert line["tokens"] == 8
    assert line["all_tokens_per_second"] >= 10 / line["seconds"]


def test_use_of_the_peak_is_that_of_all_ranks_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Amount, str]] = []

    def worth(found: Any, amount: Amount, convention: str) -> float:
        seen.append((amount, convention))
        return {"mfu": 3e9, "mfu_palm": 6e9}[convention]

    monkeypatch.setattr(measuring, "peak", lambda run: 1e12)
    monkeypatch.setattr(measuring, "passes", lambda run: [SimpleNamespace(spec=Passes)])
    monkeypatch.setattr(measuring, "operations", worth)
    line = measured(tmp_path, steps=1)[0]
    assert line["mfu"] / line["all_tokens_per_second"] == pytest.approx(3e9 / 1e12 / seen[0][0].tokens)
    assert line["mfu_palm"] == pytest.approx(2 * line["mfu"])
    assert [convention for _, convention in seen] == ["mfu", "mfu_palm"] and seen[0][0].targets == line["tokens"]


def test_a_model_unlike_all_that_is_known_trains_without_that_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "peak", lambda run: 1e12)
    monkeypatch.setattr(measuring, "passes", lambda run: {}["hidden_size"])
    assert "mfu" not in measured(tmp_path, steps=1)[0]
    assert "MFU is not measured: KeyError" in capsys.readouterr().err


def test_a_rank_that_sleeps_within_a_pass_waits_for_others(tmp_path: Path) -> None:
    run = made(tmp_path).run
    run.world = dataclasses.replace(run.world, size=2)
    run.phases.listeners.append(Measuring(run))
    for name, sleeps in (("data", 0.2), ("forward", 0.0), ("backward", 0.1), ("optimizer", 0.05)):
        with run.phases(name):
            time.sleep(sleeps)
    assert 0.15 <= run.noted[measuring.EXPOSED] < 0.2


def test_an_edge_costs_less_than_a_ten_thousandth_of_a_second() -> None:
    clock = HostClock()
    begin = time.thread_time()
    marks = [clock() for _ in range(1000)]
    assert time.thread_time() - begin < 0.1
    assert slept(marks[0], marks[-1]) >= 0


class Allocator:
    """torch.cuda's peak, as a test sets it. peak: bytes since it was last forgotten."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        stats = lambda device: {"allocated_bytes": {"all": {"peak": self.peak}}}  # noqa: E731
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", stats)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", 1))


def test_each_phase_has_a_peak_and_the_largest_of_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    allocator.peak = 50
    memory = Memory(torch.device("cpu"))
    for phase, peaks in (("forward", 30), ("backward", 70), ("forward", 40), ("optimizer", 20)):
        memory(phase, True)
        allocator.peak = peaks
        memory(phase, False)
        allocator.peak = 5
    assert memory.take() == {
        "memory_bytes": 70.0,
        "memory_bytes/forward": 40.0,
        "memory_bytes/backward": 70.0,
        "memory_bytes/optimizer": 20.0,
    }
    assert memory.take() == {"memory_bytes": 70.0}


def test_an_accelerators_time_is_that_of_its_stream_and_is_read_when_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Allocator(monkeypatch)
    marks: list[int] = []
    behind = 2  # edges that the device has not come to when the host ends a step

    def event() -> int:
        marks.append(len(marks))
        return marks[-1]

    monkeypatch.setattr(measuring, "event", event)
    monkeypatch.setattr(measuring, "computed", lambda begin, end: float(end - begin))
    monkeypatch.setattr(measuring, "reached", lambda mark: mark <= len(marks) - 1 - behind)
    run = made(tmp_path).run
    run.world = dataclasses.replace(run.world, device=SimpleNamespace(type="cuda"))
    run.phases.listeners.append(Measuring(run))
    for _ in range(2):
        run.noted.clear()
        for name in ("data", "forward", "backward", "optimizer"):
            with run.phases(name):
                pass
    times = {name: value for name, value in run.noted.items() if name.startswith("seconds/")}
    assert times == {f"seconds/{phase}": 1.0 for phase in ("data", "forward", "optimizer")} | {
        "seconds/backward": 1.0,
        "seconds/other": 3.0,
    }


def test_it_keeps_what_trackers_promise(tmp_path: Path) -> None:
    check_tracker(lambda: Usage(UsageSettings()), tmp_path)


def test_what_cannot_be_measured_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: Any) -> Any:
        raise ValueError("unheard of")

    monkeypatch.setattr(measuring, "sums", wrong)
    lines = measured(tmp_path, objective=Plain(), steps=3)
    assert len(lines) == 3 and not any("all_tokens_per_second" in line for line in lines)
    assert capsys.readouterr().err.count("measures no more: ValueError: unheard of") == 1
