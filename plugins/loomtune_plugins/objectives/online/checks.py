"""What learning from completions asks of other choices, before the run. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from loomtune.plan import Finding, Plan

NAMES = ("grpo", "rloo", "ppo", "online_dpo")
"""The objectives that draw completions and have them scored."""

CLIPS = {"clip_low": 0.2, "clip_high": None, "clip_ceiling": None}
"""Bounds of ratios, with what they are where nobody sets them."""


def findings(plan: Plan) -> Iterator[Finding]:
    """What would fail, or measure nothing."""
    chosen = next(iter(plan.choices("objective").values()), {})
    name, rollout = chosen.get("name"), next(iter(plan.choices("rollout").values()), {})
    if name not in NAMES:
        if rollout.get("ahead"):
            what = f"rollout.ahead={rollout['ahead']} has no effect with objective={name}, which begins nothing ahead"
            yield Finding(what, "set rollout.ahead=0", fatal=False)
        return
    if "heldout" in plan.choices("evaluator"):
        what = f"evaluator=heldout measures nothing with objective={name}, whose rows are prompts without an answer"
        yield Finding(what, "set evaluator=[reward], or another that generates", fatal=False)
    if (minibatches := chosen.get("minibatches", 1)) > plan.root.batch.size:
        what = f"objective.minibatches={minibatches} deals out {plan.root.batch.size} prompts of a batch: some get none"
        yield Finding(what, f"set batch.size to at least {minibatches}, or objective.minibatches to fewer")
    most, longest = chosen.get("max_new_tokens", 0), plan.root.max_length
    if longest and most >= longest:
        what = f"objective.max_new_tokens={most} leaves no room for a prompt within max_length={longest}"
        yield Finding(what, "raise max_length, or lower objective.max_new_tokens", fatal=False)
    if chosen.get("epochs", 1) * chosen.get("minibatches", 1) == 1 and not rollout.get("ahead"):
        for key, default in CLIPS.items():
            if chosen.get(key) not in (None, default):
                what = f"objective.{key} has no effect where one step comes of a batch: all importance ratios are 1"
                yield Finding(what, "set objective.epochs or objective.minibatches to 2 or more", fatal=False)
    adapter = next(iter(plan.choices("adapter").values()), {})
    if dropout := adapter.get("dropout"):
        what = f"adapter.dropout={dropout:g} drops out at random what objective={name} compares: completions are drawn"
        what += " without it, so that not even the first importance ratio would be 1"
        yield Finding(what, "set adapter.dropout=0")
