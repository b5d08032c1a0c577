"""Which rows an evaluator measures on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.errors import UserError, near

if TYPE_CHECKING:
    from loomtune.contracts import Data
    from loomtune.run import Run


def data_of(run_plan: object) -> Data | None:
    """The data of a plan; None where they are unreadable, which their own check reports."""
    from loomtune.catalogue import installed
    from loomtune.plan import Plan

    assert isinstance(run_plan, Plan)
    try:
        data: Data = run_plan.build(installed(), "data")
        data.check()
    except UserError:
        return None
    return data


def check_split(data: Data, evaluator: str, split: str) -> None:
    """Raises UserError where the data have no such split."""
    splits = data.splits()
    if split not in splits:
        raise UserError.of(
            f"evaluator={evaluator} measures on the split '{split}', which the data do not have.{near(split, splits)}",
            f"set evaluator.{evaluator}.split to one of: {', '.join(splits)}",
        )


def limit(run: Run, rows: int) -> int:
    """At most how many rows to take: the evaluator's own number, else that of the run; 0 for all."""
    return rows or run.settings.evaluate.rows
