"""What the objective contract itself does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from loomtune.contracts import Batch, LossSums, Objective, Row, Sample, Segment, Tokenizer


def segment(*tokens: int, learned: bool, parent: int = -1) -> Segment:
    return Segment(np.array(tokens, np.int32), np.full(len(tokens), learned), parent)


class Fixed(Objective):
    """Makes the same sample of every row."""

    def __init__(self, *segments: Segment) -> None:
        self.segments = segments

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        return Sample(self.segments)

    def fingerprint(self) -> str:
        return ""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {}

    def loss(self, roles: Any, batch: Batch, totals: Any, statistics: Any) -> LossSums:
        raise AssertionError


def test_a_prompt_is_what_stands_before_the_first_target() -> None:
    tokens, targets = np.array([1, 2, 5, 6], np.int32), np.array([False, False, True, True])
    assert Fixed(Segment(tokens, targets)).prompt({}, None) == [1, 2]


def test_a_shared_prompt_is_that_of_all_ancestors() -> None:
    pair = segment(1, 2, learned=False), segment(5, learned=True, parent=0), segment(6, learned=True, parent=0)
    assert Fixed(*pair).prompt({}, None) == [1, 2]
    turns = segment(1, learned=False), segment(2, 3, learned=False, parent=0), segment(4, learned=True, parent=1)
    assert Fixed(*turns).prompt({}, None) == [1, 2, 3]


def test_a_row_without_targets_has_no_prompt() -> None:
    with pytest.raises(ValueError, match="no target"):
        Fixed(segment(1, learned=False)).prompt({}, None)
