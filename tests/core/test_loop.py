"""The loop's own promises, on the toy network: what a step is divided by, what guards may do, where a run goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import Diary, Online, Plain, Rows, Scripted, Toy, TwoNetworks, made, sample

from loomtune import checkpoint
from loomtune.contracts import Sample, Segment, Verdict
from loomtune.errors import RunFailed
from loomtune.loop import Loop


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def visited(objective: Plain, size: int) -> list[list[int]]:
    """The samples' numbers of each step, whatever its micro-batches were."""
    flat = [number for seen in objective.seen for number in seen]
    return [sorted(flat[begin : begin + size]) for begin in range(0, len(flat), size)]


def close(one: Diary, other: Diary) -> None:
    assert len(one.steps) == len(other.steps) > 0
    for mine, theirs in zip(one.steps, other.steps, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_step_is_divided_once_by_all_of_its_targets(tmp_path: Path) -> None:
    first = made(tmp_path, steps=1, size=4, micro=1)
    before = []
    first.run.events.manager.register(Watcher(first, before))
    first.train()
    order = first.diary.steps[0]
    assert order["tokens"] == sum(length - 1 for length in before[0])
    whole = made(tmp_path / "whole", steps=1, size=4, micro=4)
    whole.train()
    close(first.diary, whole.diary)
    assert len({length for length in before[0]}) > 1, "with rows of one length a mean of means would pass"


class Watcher:
    """Notes the lengths of the rows of each step, from the order of the run."""

    def __init__(self, toy: Toy, noted: list[list[int]]) -> None:
        self.toy, self.noted = toy, noted

    def _note(self, step: int) -> None:
        from loomtune.batching import Order

        run, size = self.toy.run, self.toy.run.settings.batch.size
        order = Order(run.settings.seed, len(run.splits["train"]))
        rows = [order.row(number) for number in range((step - 1) * size, step * size)]
        self.noted.append([run.splits["train"][row].length for row in rows])


def test_what_a_target_counts_cancels(tmp_path: Path) -> None:
    once, thrice = made(tmp_path / "1", Plain(1.0), micro=2), made(tmp_path / "3", Plain(3.0), micro=2)
    once.train(), thrice.train()
    close(once.diary, thrice.diary)
