"""Which rows are held out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loomtune.contracts import Row, SplitStage
from loomtune.contracts.data import sides
from loomtune.errors import UserError
from loomtune_plugins.stages import minhash
from loomtune_plugins.stages.said import asked, digest
from loomtune_plugins.stages.settings import SplitSettings
from loomtune_plugins.stages.shingles import characters_of, folded

SIZE = 5
RECALL = 0.99


class Split(SplitStage):
    """Deals rows to train, validation and test, so that no prompt, and nothing like it, is in two of them.

    Rows without a prompt are compared by their text. Answers are not looked at.
    """

    def __init__(self, settings: SplitSettings) -> None:
        _check(settings)
        self._held_out = {"validation": settings.validation, "test": settings.test}
        self._group, self._similar, self._hashes = settings.group, settings.similar, settings.hashes
        self.threshold = settings.similar or 1.0
        self._bands = (1, 0)
        if settings.similar:
            self._bands = minhash.banded(settings.similar, settings.hashes, RECALL, "stage.split")
        hashes = settings.hashes if settings.similar else 0
        self._type = np.dtype([("group", "<u8"), ("prompt", "<u8"), ("signature", "u1", (hashes,))])

    def versions(self) -> Mapping[str, str]:
        return minhash.versions() if self._similar else {}

    def shares(self) -> Mapping[str, float]:
        held_out = {split: share for split, share in self._held_out.items() if share}
        return {"train": 1 - sum(held_out.values()), **held_out}

    def describe(self, rows: Sequence[Row]) -> NDArray[Any]:
        """For each row digests of its group (0: none) and its prompt, and the prompt's signature."""
        described = np.zeros(len(rows), self._type)
        prompts = [asked(row) or sides(row)[1] for row in rows]
        described["group"] = [self._group_of(row) for row in rows]
        described["prompt"] = [digest(folded(prompt)) for prompt in prompts]
        if self._similar:
            described["signature"], _ = minhash.signatures(prompts, characters_of, SIZE, self._hashes)
        return described

    def keys(self, described: NDArray[Any]) -> NDArray[Any]:
        """Of the group, of the prompt, and of the bands of its signature."""
        group, prompt = described["group"], described["prompt"]
        own = [np.where(group == 0, prompt, group), prompt]
        near = minhash.keys(described["signature"], np.zeros(len(described), np.uint64), *self._bands)
        return np.concatenate([np.stack(own, axis=1), near], axis=1)

    def alike(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """1 where the group or the prompt is the same, else how alike the prompts are."""
        same = (one["prompt"] == other["prompt"]) | ((one["group"] == other["group"]) & (one["group"] != 0))
        if not self._similar:
            return np.asarray(same, np.float32)
        return np.where(same, 1.0, minhash.similarity(one["signature"], other["signature"])).astype(np.float32)

    def _group_of(self, row: Row) -> int:
        if not self._group:
            return 0
        if self._group not in row:
            what = f"{row.get('origin', 'a row')} has no column {self._group}; it has {', '.join(sorted(row))}"
            raise UserError.of(what, "set stage.split.group to a column of all rows, or leave it out")
        value = row[self._group]
        return 0 if value is None else digest(json.dumps(value, sort_keys=True, default=str))


def _check(settings: SplitSettings) -> None:
    held_out = {"validation": settings.validation, "test": settings.test}
    for split, share in held_out.items():
        if not 0 <= share < 1:
            what = f"stage.split.{split}={share} is no share of the rows"
            raise UserError.of(what, f"set stage.split.{split} to 0 or more, and less than 1")
    if sum(held_out.values()) >= 1:
        what = (
            f"stage.split.validation={settings.validation} and stage.split.test={settings.test} leave nothing to train"
        )
        raise UserError.of(what, "let them add up to less than 1")
    if not sum(held_out.values()) and (settings.group or settings.similar != SplitSettings().similar):
        what = "stage.split holds nothing out, so nothing has to stay together"
        raise UserError.of(what, "set stage.split.validation or stage.split.test, or leave group and similar out")
    if not settings.similar and settings.hashes != SplitSettings().hashes:
        what = f"stage.split.hashes={settings.hashes} describes nothing where stage.split.similar=0"
        raise UserError.of(what, "leave stage.split.hashes out, or set stage.split.similar=0.7")
    if settings.similar and not 0.5 <= settings.similar <= 1:
        what = f"stage.split.similar={settings.similar} does not lie between 0.5 and 1, and is not 0"
        raise UserError.of(what, "set stage.split.similar=0.7, or 0 to keep only equal prompts together")
    if settings.hashes < 1:
        raise UserError.of(f"stage.split.hashes={settings.hashes} describes nothing", "set stage.split.hashes=256")
