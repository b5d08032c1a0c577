"""Steps of data preparation. Importing this folder imports none of the libraries that they use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loomtune import hookimpl
from loomtune.contracts import Stage
from loomtune.offers import Offer
from loomtune.plan import Finding, Plan
from loomtune_plugins.stages.asking_settings import AnswerSettings, CritiqueSettings, PrincipledSettings
from loomtune_plugins.stages.settings import (
    CleanSettings,
    DecontaminateSettings,
    ExactSettings,
    LanguageSettings,
    NearSettings,
    SemanticSettings,
    SplitSettings,
)


@hookimpl
def stages() -> Sequence[Offer[Stage]]:
    """Offers the built-in stages."""
    return (
        Offer(
            name="clean",
            build="loomtune_plugins.stages.clean:Clean",
            schema=CleanSettings,
            summary="Unicode, invisible characters, HTML, lengths; rows without an answer go",
        ),
        Offer(
            name="language",
            build="loomtune_plugins.stages.language:Language",
            schema=LanguageSettings,
            summary="drops rows of languages that are not wanted (py3langid)",
        ),
        Offer(
            name="exact",
            build="loomtune_plugins.stages.exact:Exact",
            schema=ExactSettings,
            summary="drops rows that teach what an earlier one teaches, to the letter",
        ),
        Offer(
            name="near",
            build="loomtune_plugins.stages.near:Near",
            schema=NearSettings,
            summary="drops rows whose prompt and answer are nearly an earlier one's (MinHash and bands)",
        ),
        Offer(
            name="semantic",
            build="loomtune_plugins.stages.semantic:Semantic",
            schema=SemanticSettings,
            summary="drops rows whose prompt and answer mean what an earlier one's do (embeddings, each with each)",
        ),
        Offer(
            name="decontaminate",
            build="loomtune_plugins.stages.decontaminate:Decontaminate",
            schema=DecontaminateSettings,
            summary="drops rows that share a run of words with evaluation files",
        ),
        Offer(
            name="answer",
            build="loomtune_plugins.stages.answer:Answer",
            schema=AnswerSettings,
            summary="a language model answers each prompt, once or several times",
        ),
        Offer(
            name="critique",
            build="loomtune_plugins.stages.critique:Critique",
            schema=CritiqueSettings,
            summary="Constitutional AI: a model criticises each answer by a principle and revises it, several times",
        ),
        Offer(
            name="principled",
            build="loomtune_plugins.stages.principled:Principled",
            schema=PrincipledSettings,
            summary="Constitutional AI: a model chooses the better of two answers by a principle; soft labels",
        ),
        Offer(
            name="split",
            build="loomtune_plugins.stages.split:Split",
            schema=SplitSettings,
            summary="deals rows to train, validation and test; what is alike stays together",
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """A run reads rows that are ready; a stage would do nothing there."""
    if not (chosen := ",".join(plan.choices("stage"))):
        return []
    cure = f"prepare first: loomtune prepare FILES --out DIR stage=[{chosen}], then train on data.path=DIR"
    return [Finding(f"stage=[{chosen}] prepares data, and a run prepares none", cure)]
