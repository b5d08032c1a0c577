"""The micro-batch that `auto` chooses. What is measured on a GPU is tested there; here, what follows from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loomtune import micro
from loomtune.batching import CPU_TOKENS
from loomtune.micro import MARGIN, affordable, token_budget
from loomtune.settings import BatchSettings, Settings
from loomtune.testing import toy
from loomtune_plugins.shardings.engine import TorchEngine
from loomtune_plugins.shardings.whole import Whole
from toys import made


def test_a_cpu_gets_a_constant(tmp_path: Path) -> None:
    assert token_budget(made(tmp_path).run) == CPU_TOKENS


@pytest.mark.parametrize(
    ("capacity", "rows"), [(100, 1), (149, 1), (150, 2), (1000, 19)], ids=["one", "almost two", "two", "many"]
)
def test_as_many_rows_fit_as_memory_grows_with_each(capacity: int, rows: int) -> None:
    assert affordable([100, 150], 512, capacity) == 512 * rows


def test_one_row_is_tried_even_where_it_should_not_fit() -> None:
    assert affordable([100, 150], 512, 20) == 512


def test_a_split_of_one_row_or_a_peak_that_does_not_grow_gives_a_budget_all_the_same() -> None:
    assert affordable([100], 512, 103) == 512 * 4
    assert affordable([100, 100], 512, 103) == 512 * 4


class Elsewhere(Whole):
    """A layout whose parameters live on another device than the one that computes, as offloaded ones do."""

    def home(self, device: torch.device) -> torch.device:
        return torch.device("meta")


def test_state_that_lies_on_another_device_takes_nothing_of_this_ones() -> None:
    here, elsewhere = (TorchEngine(toy.spec(), toy.world(), layout) for layout in (Whole(), Elsewhere()))
    assert here.state_bytes() == sum(tensor.nbytes for _, tensor in here.stream_weights())
    assert elsewhere.state_bytes() == 0


def on_accelerator(folder: Path, monkeypatch: pytest.MonkeyPatch, state_bytes: int) -> int:
    """The budget on a device of 1,000 bytes, where one row peaks at 100 of them and two at 150."""
    run = made(folder, settings=Settings(batch=BatchSettings(micro="auto"))).run
    run.world = dataclasses.replace(run.world, device=SimpleNamespace(type="accelerator"))
    engine: Any = SimpleNamespace(state_bytes=lambda: state_bytes)
    monkeypatch.setattr(type(run), "trained_engines", lambda self: [engine])
    monkeypatch.setattr(micro, "_peak", lambda run, rows: 50 + 50 * len(rows))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1000 / MARGIN))
    return token_budget(run)


def test_only_state_on_the_device_is_kept_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded, held = (on_accelerator(tmp_path / str(size), monkeypatch, size) for size in (0, 500))
    longest = len("of a shuttle") + 1
    assert (offloaded, held) == (19 * longest, 9 * longest)
