"""Measurements of a model."""

from collections.abc import Mapping, Sequence

from loomtune import hookimpl
from loomtune.contracts import Evaluator
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding, Plan
from loomtune_plugins.evaluators.settings import HeldoutSettings, RewardedSettings, SQLAccuracySettings


@hookimpl
def evaluators() -> Sequence[Offer[Evaluator]]:
    """Gives the built-in evaluators."""
    return (
        Offer(
            name="heldout",
            build="loomtune_plugins.evaluators.heldout:Heldout",
            schema=HeldoutSettings,
            summary="the objective's loss on rows that are not trained on",
        ),
        Offer(
            name="reward",
            build="loomtune_plugins.evaluators.rewarded:Rewarded",
            schema=RewardedSettings,
            summary="what the chosen rewards say of answers to prompts that are not trained on",
            needs=frozenset({Trait.GENERATION}),
        ),
        Offer(
            name="sql_accuracy",
            build="loomtune_plugins.evaluators.sql_accuracy:SQLAccuracy",
            schema=SQLAccuracySettings,
            summary="the share of generated queries that return what the right query returns",
            needs=frozenset({Trait.DATABASES, Trait.GENERATION}),
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """The evaluator of rewards needs one."""
    if "reward" not in plan.choices("evaluator") or plan.choices("reward"):
        return []
    what = "evaluator=reward measures by rewards, and none is chosen"
    return [Finding(what, "set reward=[...] to some that `loomtune plugins` lists, or leave the evaluator out")]
