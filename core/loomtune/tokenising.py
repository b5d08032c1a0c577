"""Before a run: its samples are made, what must fit them is checked, and what happened to rows is told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from loomtune import role_models, samplers, samples, streaming
from loomtune.catalogue import Catalogue
from loomtune.contracts import Adapter, Data, Model, Objective
from loomtune.errors import UserError
from loomtune.order import REPEATS, Share
from loomtune.placement import row_width
from loomtune.plan import Finding, Plan


def tokenise(plan: Plan, catalogue: Catalogue, *, tell_cuts: bool = True) -> dict[str, dict[str, Any]]:
    """Samples of every split, cached by content: where each lies, and of `train` the run's steps.

    Raises UserError where they do not fit the rest.
    """
    model: Model = plan.build(catalogue, "model")
    data: Data = plan.build(catalogue, "data")
    objective: Objective = plan.build(catalogue, "objective")
    objective.use(plan.build(catalogue, "loss"), plan.build(catalogue, "reward"))
    adapter: Adapter = plan.build(catalogue, "adapter")
    virtual = adapter.virtual_tokens
    room = model.context() - virtual
    length = row_width(plan.root, model, virtual)
    if length > room:
        less = f", of which the adapter takes {virtual}" if virtual else ""
        raise UserError.of(
            f"max_length={length} is longer than the model's context of {model.context()} tokens{less}",
            f"set max_length to at most {room}",
        )
    tokenizer, cache = model.tokenizer(), samples.default_cache()
    role_models.suit(role_models.models(plan, catalogue), tokenizer, length)
    placed: dict[str, dict[str, Any]] = {}
    for split in data.splits():
        window = data.window if split == "train" else 0
        source = samples.Source(data, objective, tokenizer, split, length, window)
        streaming.check_sent(source)
        made = samples.prepare(source, cache, model.vocabulary())
        _tell_lost(made, split, length, cuts=tell_cuts)
        placed[split] = {"cache": str(cache), "key": made.key}
        if split == "train":  # what an adapter holds against so many steps is told before ranks exist
            sampler = samplers.sampler(plan.root, made, data, length)
            placed[split]["steps"] = steps = samplers.steps(plan.root, sampler, objective)
            adapter.optimizer(plan.build(catalogue, "optimizer"), steps)
            _tell_shares(sampler.order.shares)
    return placed


def _tell_shares(shares: Sequence[Share]) -> None:
    """How often an epoch visits each of several sources, and which too often."""
    if any(share.name for share in shares):
        print(f"loomtune: visits of an epoch: {', '.join(map(str, shares))}", file=sys.stderr)  # noqa: T201
    for share in shares:
        if share.visits > REPEATS * share.rows:
            times = float(share.visits / share.rows)
            what = f"an epoch visits each of the {share.rows} rows of {share.name} {times:g} times"
            warn([Finding(what, "give it a smaller share, or more rows", fatal=False)])


def _tell_lost(made: samples.Samples, split: str, length: int, *, cuts: bool) -> None:
    if made.told:
        warn([Finding(made.told, "mend these rows, or take them out", fatal=False)])
    if made.left_out:
        warn([Finding(made.left_out[0], made.left_out[1], fatal=False)])
    if cuts and (made.cut or made.skipped):
        what = f"{made.cut} of {len(made)} rows of {split} lose {made.cut_tokens} tokens to max_length={length}"
        left = f"; {made.skipped} more are left out, because it cuts their whole answer" if made.skipped else ""
        warn([Finding(what + left, "raise max_length where the model's context allows it", fatal=False)])


def warn(warnings: Sequence[Finding]) -> None:
    """Shows what is doubtful, on stderr."""
    for finding in warnings:
        print(f"loomtune: warning: {finding.what}\n    cure: {finding.cure}", file=sys.stderr)  # noqa: T201
