"""A stretch of a flattened tensor is cut into boxes that hold it, in order."""

from __future__ import annotations

from math import prod

import pytest
import torch

from loomtune_plugins.shardings.flat import boxes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (5, 1), (1, 5), (2, 3, 4), (3, 1, 2), (2, 2, 2, 2)])
def test_the_boxes_of_every_stretch_hold_it_in_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(prod(shape)).view(shape)
    for begin in range(tensor.numel() + 1):
        for end in range(begin, tensor.numel() + 1):
            found = list(boxes(shape, begin, end))
            parts = [tensor[box.region] for box in found]
            assert [tuple(part.shape) for part in parts] == [box.extent for box in found]
            assert [int(part.flatten()[0]) for part in parts] == [box.begin for box in found]
            assert [number for part in parts for number in part.flatten().tolist()] == list(range(begin, end))


def test_a_matrix_is_cut_into_three_boxes_at_most() -> None:
    counts = [len(list(boxes((5, 4), begin, end))) for begin in range(20) for end in range(begin, 21)]
    assert max(counts) == 3
    assert [box.extent for box in boxes((5, 4), 3, 18)] == [(1, 1), (3, 4), (1, 2)]
    assert [box.extent for box in boxes((5, 4), 0, 20)] == [(5, 4)]
