"""Which rows an evaluator measures on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loomtune.errors import UserError, near

if TYPE_CHECKING:
    from loomtune.contracts import Data
    from loomtune.run import Run


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
