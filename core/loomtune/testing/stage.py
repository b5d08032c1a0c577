"""Checks of stages of data preparation."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from loomtune.contracts import DuplicateStage, LinkStage, Row, RowStage, SplitStage, Stage


def check_stage(stage: Stage, rows: Sequence[Row]) -> None:
    """Checks that a stage answers for each row, alike in any company, and leaves the rows that it is given alone."""
    before = copy.deepcopy(list(rows))
    if isinstance(stage, RowStage):
        judged = list(stage.apply(rows))
        assert len(judged) == len(rows), f"of {len(rows)} rows it answers for {len(judged)}"
        alone = [one for row in rows for one in stage.apply([row])]
        assert judged == alone, "what becomes of a row hangs on its company"
    assert not isinstance(stage, LinkStage) or _links(stage, rows)
    assert list(rows) == before, "the rows that it was given are changed"


def _links(stage: LinkStage, rows: Sequence[Row]) -> bool:
    described = stage.describe(rows)
    assert len(described) == len(rows), f"of {len(rows)} rows it describes {len(described)}"
    alone = np.concatenate([stage.describe([row]) for row in rows])
    assert alone.dtype == described.dtype and alone.shape == described.shape, "descriptions differ in type or shape"
    assert (stage.alike(described, alone) >= stage.threshold).all(), "a row is not alike to itself in other company"
    keys, keys_alone = stage.keys(described), stage.keys(alone)
    if keys is not None and keys_alone is not None:
        assert keys.dtype == np.uint64 and keys.ndim == 2, "keys are no `(rows, keys)` uint64"
        assert (keys == keys_alone).all(), "a row's keys hang on its company"
    other = np.roll(described, 1, axis=0)
    one, back = stage.alike(described, other), stage.alike(other, described)
    assert one.shape == (len(rows),) and np.allclose(one, back), "how alike two rows are depends on which comes first"
    table = stage.table(described, described)
    assert np.allclose(np.diagonal(np.roll(table, 1, axis=1)), one, atol=1e-5), "table and alike do not agree"
    assert not isinstance(stage, DuplicateStage) or stage.reason, "dropped rows need a reason"
    assert not isinstance(stage, SplitStage) or abs(sum(stage.shares().values()) - 1) < 1e-9, "shares add up to 1"
    return True
