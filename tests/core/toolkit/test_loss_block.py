"""The loss block holds a chunk of logits, never those of a whole row; both paths give the same numbers."""

from __future__ import annotations

import pytest
import torch

from loss_block import CASES, PATHS, Block, allocated, fresh

FEW = 2048
"""Tokens of a vocabulary at which 4,096 rows of logits are 32 MB: most of what is allocated, and quick."""


@pytest.mark.parametrize(("whole", "ours"), [("plain", "chunked"), ("plain_divergence", "chunked_divergence")])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_both_paths_give_the_same_loss_and_gradients(whole: str, ours: str, share: float) -> None:
    for one, other in zip(PATHS[whole](Block(1500, 64, share)), PATHS[ours](Block(1500, 64, share)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("whole", "ours"), [("plain", "chunked"), ("plain_divergence", "chunked_divergence")])
def test_a_row_of_4096_targets_takes_at_most_a_quarter_of_the_plain_path(whole: str, ours: str) -> None:
    peaks = [_peak(path) for path in (whole, ours)]
    logits = 4096 * FEW * 4
    assert peaks[0] > 2 * logits, "the plain path makes them all, and more than once"
    assert peaks[1] < 0.25 * peaks[0], peaks


def test_positions_that_predict_nothing_cost_nothing() -> None:
    assert _peak("chunked", 0.125) < 0.7 * _peak("chunked")


def _peak(path: str, share: float = 1.0) -> int:
    block = Block(4096, FEW, share)
    return allocated(lambda: PATHS[path](block))


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "ours", "share"), [case[1:] for case in CASES])
def test_of_32000_tokens_the_allocator_and_the_process_see_a_quarter(whole: str, ours: str, share: float) -> None:
    for rss in (False, True):
        one, other = (fresh(path, share, rss=rss) for path in (whole, ours))
        assert other < 0.25 * one, (rss, one, other)
