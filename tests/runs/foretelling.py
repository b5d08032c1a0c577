"""What a rehearsal says of a run, in a process of its own: its process group is global to it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from loomtune import api
from loomtune.contracts import Sample
from loomtune.plan import Plan
from runs.worlds import SERVER


def foretold(overrides: Sequence[str], processes: int, rank: int = 0) -> dict[str, Any]:
    """The peaks of a rank's moments, and of what the highest is made, as plain data."""
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        return pool.submit(_predict, overrides, processes, rank).result()


def _predict(overrides: Sequence[str], processes: int, rank: int) -> dict[str, Any]:
    from loomtune_plugins.planner.rehearse import rehearse

    plan = api.compose(overrides, processes=processes)
    trace = rehearse(plan, processes, rank, rows=lengths(plan))
    moments = {name: peak.bytes for name, peak in trace.moments.items()}
    found: dict[str, Any] = {"peak": trace.peak.bytes, "moments": moments, "causes": dict(trace.peak.causes)}
    return found | {"tokens": trace.tokens, "targets": trace.targets, "micro": trace.micro}


def lengths(plan: Plan) -> list[Sequence[int]]:
    """Tokens of the prompt and of the answers of each row of a step, in the order in which the run draws them."""
    from loomtune.session import drawn, looked_at

    run = looked_at(plan)
    return [_parts(run.splits["train"][row]) for row in next(drawn(run, "train"))]


def _parts(sample: Sample) -> Sequence[int]:
    first, *answers = sample.segments
    learned = int(first.is_target.sum())
    if answers:
        return len(first.tokens), *(len(answer.tokens) for answer in answers)
    return len(first.tokens) - learned, learned
