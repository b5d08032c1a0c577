"""What the allocator's records say of cases known by hand, and that torch's own profiler says the same."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import pytest
import torch

from loomtune.phases import Phases
from runs.allocations import Recorder, built

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="allocations.cpp needs a compiler, named c++")

FLOAT = 4


def test_peaks_are_what_lived_together_in_each_moment() -> None:
    recorder = Recorder(phases := Phases())
    with recorder() as records:
        with recorder.moment("birth"):
            kept = torch.empty(1000)
        with phases("forward"):
            passing = torch.empty(500)
            del passing
            state = torch.empty(300)
        with phases("backward"):
            del state
            last = torch.empty(100)
    assert records.peaks == {
        "birth": 1000 * FLOAT,
        "forward": 1500 * FLOAT,
        "backward": 1300 * FLOAT,
        "between": 1300 * FLOAT,
    }
    assert records.peak == 1500 * FLOAT
    assert sorted(block.bytes for block in records.held) == [500 * FLOAT, 1000 * FLOAT]
    assert [block.moment for block in records.left] == ["birth", "backward"]
    assert sum(block.bytes for block in records.left) == kept.nbytes + last.nbytes


def test_memory_from_before_the_recording_is_not_counted() -> None:
    old = torch.empty(1000)
    with Recorder()() as records:
        del old
        new = torch.empty(10)
    assert records.peak == new.nbytes


def test_what_another_thread_frees_is_heard_of() -> None:
    with Recorder()() as records:
        held = [torch.empty(1000)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        after = torch.empty(10)
    assert [block.bytes for block in records.left] == [after.nbytes]


def step() -> None:
    model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 16, 32)).sum().backward()
    optimizer.step()


def test_the_profiler_of_torch_counts_the_same_on_a_thread_that_it_follows() -> None:
    with torch.profiler.profile(profile_memory=True) as profiled, Recorder()() as records:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert max(itertools.accumulate(sizes)) == records.peak > 100_000


def test_blocks_are_explained_by_the_operations_that_asked_for_them() -> None:
    recorder = Recorder(profiled=True)
    with recorder() as records:
        kept = torch.randn(100, 100) @ torch.randn(100, 50)
    told = records.explained(records.left)
    assert [(size, count, what.split(" > ")[-1]) for size, count, what in told] == [(kept.nbytes, 1, "aten::mm")]


def test_it_is_compiled_once() -> None:
    path: Path = built()
    made = path.stat().st_mtime_ns
    assert built() == path
    assert path.stat().st_mtime_ns == made
