"""What a reward model says of an answer, in its own training and where its scores are learned from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from loomtune.contracts import Batch, Role, Segment, Tokenizer, View

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "reward"
"""The scalar head, `heads.reward.weight` in files."""

RENDERING = ("separator", "bos", "system")
"""Settings of an objective that decide with which tokens a prompt is written."""

SAID = "What was said last"


def scored_at_the_end(answer: Segment, after: int) -> Segment:
    """The answer with one token more, which nothing sees and whose place alone matters; no target if it had none."""
    ids = np.append(answer.tokens, np.int32(after))
    return Segment(ids, (np.arange(len(ids)) == len(ids) - 1) & answer.is_target.any(), answer.parent)


def scores(role: Role, batch: Batch, head: Callable[[View], Tensor] | None = None) -> Tensor:
    """The scalar head's number `(targets,)` fp32 at the position before each target.

    head: what gives the numbers in the place of the role's own head.
    """

    def reader(view: View) -> Tensor:
        numbers = view.heads[role.head](view.states) if head is None else head(view)
        return numbers.float().squeeze(-1)

    result: Tensor = role.read(batch, reader)
    return result


def after_the_stop(tokenizer: Tokenizer, stop: int) -> list[int]:
    """What rows of conversations have after the token with which the policy stops: where their answers are scored.

    A template may write a line's end after the end of a turn, and where that is not `eos` the rows are ended by it.
    """
    asked = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": SAID}]
    end = tokenizer.render(asked).rpartition(SAID)[2]
    tail = _behind(SAID, end, tokenizer)
    marked = _behind(SAID, end.rstrip(), tokenizer) if end.strip() else tail
    if marked[-1:] != [tokenizer.eos_id]:
        tail = [*tail, tokenizer.eos_id]
    return tail[tail.index(stop) + 1 :] if stop in tail else []


def _behind(text: str, more: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text behind another: alone it may begin with a blank of the tokenizer's own."""
    whole, before = tokenizer.encode(text + more), tokenizer.encode(text)
    return whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(more)
