"""Samples as they come of completions, of which none was drawn: what a step is planned with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from loomtune.contracts import Sample, Segment
from loomtune_plugins.objectives.online.invariants import LATER


def group(prompt: Segment, count: int, tokens: int, max_length: int, columns: Iterable[str], *, shared: bool) -> Sample:
    """A prompt and so many completions, each as long as it may be. shared: whether the prompt is computed once for all.

    tokens: of a completion, where there is room for them in `max_length`. columns: names, for every target.
    """
    length = max(1, min(tokens, max_length - len(prompt.tokens)))
    ids, learned = np.zeros(length, np.int32), np.ones(length, np.bool_)
    values, nothing = ({name: np.zeros(n, np.float32) for name in columns} for n in (length, 0))
    numbers = {"sequences": float(count), "tokens": float(count * length), "first": LATER}
    unlearned = np.zeros(len(prompt.tokens), np.bool_)
    if shared:
        parent = Segment(prompt.tokens, unlearned, columns=nothing)
        return Sample((parent, *(Segment(ids, learned, 0, values) for _ in range(count))), numbers)
    whole = np.concatenate([prompt.tokens, ids]), np.concatenate([unlearned, learned])
    return Sample((Segment(*whole, columns=values),), numbers)
