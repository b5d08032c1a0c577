"""Scores of completions. Importing this folder imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loomtune import hookimpl
from loomtune.contracts import Reward
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding, Plan
from loomtune_plugins.rewards import model_files, settings
from loomtune_plugins.rewards.judge_settings import JudgeSettings
from loomtune_plugins.rewards.model_settings import ModelSettings


@hookimpl
def rewards() -> Sequence[Offer[Reward]]:
    """Offers the built-in rewards."""
    return (
        Offer(
            name="exact",
            build="loomtune_plugins.rewards.exact:Exact",
            schema=settings.ExactSettings,
            summary="1 for an answer whose final number, or whatever a pattern finds, is the right one",
        ),
        Offer(
            name="format",
            build="loomtune_plugins.rewards.format:Format",
            schema=settings.FormatSettings,
            summary="1 for an answer that matches a regular expression, or is JSON",
        ),
        Offer(
            name="function",
            build="loomtune_plugins.rewards.function:Function",
            schema=settings.FunctionSettings,
            summary="what a Python function of yours says, called in processes of its own",
        ),
        Offer(
            name="judge",
            build="loomtune_plugins.rewards.judge:Judge",
            schema=JudgeSettings,
            summary="what a language model says of an answer, served anywhere or on this machine",
        ),
        Offer(
            name="length",
            build="loomtune_plugins.rewards.length:Length",
            schema=settings.LengthSettings,
            summary="a penalty for answers that are too long or too short (DAPO's overlong punishment)",
        ),
        Offer(
            name="model",
            build="loomtune_plugins.rewards.model:RewardByModel",
            schema=ModelSettings,
            summary="what a trained reward model says (objective=reward); by a network of its own, or in the policy's",
        ),
        Offer(
            name="sql",
            build="loomtune_plugins.rewards.sql:Sql",
            schema=settings.SqlSettings,
            summary="1 for a query that returns what the right one returns",
            needs=frozenset({Trait.DATABASES}),
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Weights of all rewards, whoever made them, that may not be meant; and a reward model that does not suit."""
    chosen = plan.choices("reward")
    found = [finding for name, node in chosen.items() for finding in _weight(name, node.get("weight"))]
    return [*found, *(model_files.findings(plan, chosen["model"], provided) if "model" in chosen else ())]


def _weight(name: str, weight: object) -> Iterator[Finding]:
    if not isinstance(weight, int | float) or weight > 0:
        return
    if weight == 0:
        what, cure = f"reward.{name}.weight=0 learns nothing of it", f"leave {name} out of reward, unless to watch it"
    else:
        what = f"reward.{name}.weight={weight} makes likelier what it scores low"
        cure = f"set reward.{name}.weight above 0, unless its high scores are what is to be avoided"
    yield Finding(what, cure, fatal=False)
