"""Of a run's processes some may train nothing: how many are left, as a plan says it."""

from __future__ import annotations

import pytest

from loomtune.errors import UserError
from loomtune.plan import Plan


def planned(**rollout: object) -> Plan:
    return Plan({"rollout": {"name": "huggingface", **rollout}, "steps": 3}, {})


def test_ranks_that_generate_do_not_train() -> None:
    assert [planned(ranks=ranks).training(4) for ranks in (0, 1, 3)] == [4, 3, 1]
    assert planned().training(4) == Plan({}, {}).training(4) == 4, "an engine may have no such setting"


def test_how_many_train_is_not_known_where_processes_are_not() -> None:
    assert planned(ranks=2).training(0) == 0


def test_a_run_of_which_nothing_trains_is_refused() -> None:
    for processes in (1, 2):
        with pytest.raises(UserError, match=rf"leaves none of {processes} processes to train[\s\S]*launcher\.procs=3"):
            planned(ranks=2).training(processes)
