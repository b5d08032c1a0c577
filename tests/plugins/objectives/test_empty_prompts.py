"""Answers to an empty prompt that no token begins: nothing can predict their first token, least of all another row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loomtune.batching import collate
from loomtune.catalogue import installed
from loomtune.contracts import Sample, Segment
from loomtune.contracts.batch import NO_PARENT
from loomtune.testing.toy import ToyTokenizer

PAIR = {"prompt": "", "chosen": "weaves", "rejected": "flies"}
ROWS = {"kto": {"prompt": "", "completion": "weaves", "label": True}}


def samples(name: str, rows: list[dict[str, Any]], bos: str = "never", limit: int = 100) -> list[Sample]:
    objective = installed().build("objective", name, {"bos": bos})
    return list(objective.together([objective.sample(row, ToyTokenizer(), limit) for row in rows], limit))


@pytest.mark.parametrize("name", ["dpo", "cpo", "simpo", "orpo", "kto", "reward"])
@pytest.mark.parametrize("layout", ["shared", "unfolded", "packed"])
def test_each_target_is_predicted_from_the_token_before_it(name: str, layout: str) -> None:
    row = ROWS.get(name, PAIR)
    made = samples(name, [row, {**row, "prompt": "to "}, row])
    given = [sample.unfolded() for sample in made] if layout == "unfolded" else made
    batch = collate(given, range(3), 0, rows=[3] if layout == "packed" else None)
    assert len(batch.target) and int(batch.predict_from.min()) >= 0
    tokens, segments = batch.tokens.flatten().tolist(), batch.segments.flatten().tolist()
    for at, target, segment in zip(*(of.tolist() for of in (batch.predict_from, batch.target, batch.row)), strict=True):
        assert segments[at] in (segment, int(batch.parents[segment]))
        assert segments[at] != segment or tokens[at + 1] == target


def test_the_first_token_alone_is_no_target() -> None:
    prompt, chosen, rejected = samples("dpo", [PAIR])[0].segments
    assert len(prompt.tokens) == 0
    for answer in (chosen, rejected):
        assert answer.is_target.tolist() == [False] + [True] * (len(answer.tokens) - 1)
    prompt, *answers = samples("dpo", [PAIR], bos="always")[0].segments
    assert len(prompt.tokens) == 1 and all(answer.is_target.all() for answer in answers)


def test_another_rows_answer_behind_an_empty_prompt_loses_its_first_target_too() -> None:
    empty, asked = ROWS["kto"], {**ROWS["kto"], "prompt": "to "}
    mismatched = samples("kto", [empty, asked])[0].segments[2]
    assert mismatched.is_target.tolist() == [False] + [True] * (len(mismatched.tokens) - 1)


def segment(size: int, parent: int, *, learned: bool = False) -> Segment:
    return Segment(np.arange(3, 3 + size, dtype=np.int32), np.full(size, learned), parent)


def test_a_target_that_nothing_precedes_is_never_collated() -> None:
    with pytest.raises(AssertionError, match="nothing precedes"):
        collate([Sample((segment(0, NO_PARENT), segment(2, 0, learned=True)))], [0], 0)


def test_what_precedes_an_empty_segment_predicts_what_follows_it() -> None:
    batch = collate([Sample((segment(2, NO_PARENT), segment(0, 0), segment(1, 1, learned=True)))], [0], 0)
    assert batch.predict_from.tolist() == [1]
