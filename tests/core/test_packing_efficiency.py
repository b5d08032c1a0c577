"""How much of what is computed are tokens, where the steps of GSM8K are packed: 256 rows, of at most 512 tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from loomtune import api
from loomtune.batching import CPU_TOKENS
from loomtune.placement import MicroLimit, place
from loomtune.samples import of_run
from support import shared
from toys import whole

ROWS, WIDTH = 256, 512

Steps = list[list[int]]


def steps(lengths: Sequence[int]) -> Steps:
    """The lengths of the rows of an epoch's whole steps."""
    order, count = whole(0, len(lengths)), len(lengths) // ROWS
    return [np.asarray(lengths)[order.rows(step * ROWS, (step + 1) * ROWS)].tolist() for step in range(count)]


def laid(step: list[int], replicas: int, budget: int) -> Iterator[list[int]]:
    """The tokens of each row, by micro-batch."""
    for mine in place(range(ROWS), step, replicas, MicroLimit(ROWS, budget, WIDTH)):
        for one in mine:
            yield [sum(step[number] for number in row) for row in one.rows]


def of_computed(step: list[int], replicas: int, budget: int = CPU_TOKENS) -> float:
    """The share of tokens in what is computed: rows are as long as the longest of their micro-batch."""
    return sum(step) / sum(len(rows) * max(rows, default=0) for rows in laid(step, replicas, budget))


def rows_of(step: list[int], replicas: int) -> int:
    return sum(len(rows) for rows in laid(step, replicas, CPU_TOKENS))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """As a vocabulary of 512 has them: three rows of four are longer than half of what is packed."""
    given = [f"model.path={shared('models', 'stories260k')}", f"data.path={shared('data', 'gsm8k', 'train.jsonl')}"]
    given += ["data=jsonl", "data.prompt=question", "data.completion=answer", f"max_length={WIDTH}", "data.limit=768"]
    folder = api.prepare(api.compose([*given, f"run.dir={tmp_path_factory.mktemp('gsm8k') / 'run'}"]))
    return steps(of_run(folder)["train"].lengths.tolist())


@pytest.fixture(scope="module")
def large() -> Steps:
    """As a vocabulary of tens of thousands has them: four bytes a token."""
    read = map(json.loads, shared("data", "gsm8k", "train.jsonl").read_text().splitlines())
    return steps([min(WIDTH, len(row["question"] + row["answer"]) // 4) for row in read])


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_nearly_all_that_is_computed_are_tokens(replicas: int, small: Steps, large: Steps) -> None:
    for found in (small, large):
        assert min(of_computed(step, replicas) for step in found) >= 0.97
        assert np.mean([of_computed(step, replicas, 16 * WIDTH) for step in found]) >= 0.97


def test_rows_are_full_where_samples_are_short(large: Steps) -> None:
    for replicas in (1, 2):
        assert np.mean([sum(step) / (WIDTH * rows_of(step, replicas)) for step in large]) >= 0.97


def test_rows_are_as_few_as_there_can_be_where_samples_are_long(small: Steps) -> None:
    for step in small:
        fewest = sum(length > WIDTH // 2 for length in step)  # no two of them fit into a row
        assert fewest <= rows_of(step, 1) <= 1.03 * fewest
