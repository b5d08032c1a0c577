"""The micro-batch that `auto` chooses. What is measured on a GPU is tested there; here, what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loomtune.batching import CPU_TOKENS
from loomtune.micro import affordable, token_budget
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
