"""Sources of rows. Importing this folder imports neither torch nor any library that reads files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loomtune import hookimpl
from loomtune.contracts import Data
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding, Plan
from loomtune_plugins.data.any_files_settings import AnyFileSettings
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.hub_settings import HubSettings
from loomtune_plugins.data.mix_settings import MixSettings
from loomtune_plugins.data.oasst_settings import OasstSettings
from loomtune_plugins.data.prepared_settings import PreparedSettings
from loomtune_plugins.data.sql_quiz_settings import SqlCorpusSettings, SqlQuizSettings

_FROM_FILES = frozenset({Trait.COMPLETIONS, Trait.TEXTS, Trait.PAIRS, Trait.LABELS, Trait.PROMPTS})


@hookimpl
def datas() -> Sequence[Offer[Data]]:
    """Offers the built-in sources of rows."""
    return (
        Offer(
            name="jsonl",
            build="loomtune_plugins.data.jsonl:Jsonl",
            schema=FileSettings,
            summary="one JSON object a line, plain, .gz, .bz2 or .zst",
            provides=_FROM_FILES,
        ),
        Offer(
            name="parquet",
            build="loomtune_plugins.data.parquet:Parquet",
            schema=FileSettings,
            summary="Parquet files, read batch by batch",
            provides=_FROM_FILES,
        ),
        Offer(
            name="mix",
            build="loomtune_plugins.data.mix:Mix",
            schema=MixSettings,
            summary="several sources of files, visited by weights, by epochs of their own, or by a temperature",
            provides=_FROM_FILES,
        ),
        Offer(
            name="files",
            build="loomtune_plugins.data.any_files:AnyFiles",
            schema=AnyFileSettings,
            summary="what each file's name says: jsonl, json, csv, tsv, parquet, arrow, also .gz, .bz2, .zst",
            provides=_FROM_FILES,
        ),
        Offer(
            name="datasets",
            build="loomtune_plugins.data.hub:Hub",
            schema=HubSettings,
            summary="what the library `datasets` reads: saved on disk, or from the Hugging Face hub",
            provides=_FROM_FILES,
        ),
        Offer(
            name="prepared",
            build="loomtune_plugins.data.prepared:Prepared",
            schema=PreparedSettings,
            summary="a folder that `loomtune prepare` wrote",
            provides=_FROM_FILES,
        ),
        Offer(
            name="oasst",
            build="loomtune_plugins.data.oasst:Oasst",
            schema=OasstSettings,
            summary="conversation trees of OpenAssistant: ranked replies as pairs or labels, the best path as messages",
            provides=frozenset({Trait.COMPLETIONS, Trait.PAIRS, Trait.LABELS, Trait.PROMPTS}),
        ),
        Offer(
            name="sql_quiz",
            build="loomtune_plugins.data.sql_quiz_data:SqlQuiz",
            schema=SqlQuizSettings,
            summary="text-to-SQL made by a seeded generator; success is executed",
            provides=frozenset({Trait.COMPLETIONS, Trait.PAIRS, Trait.PROMPTS, Trait.DATABASES}),
        ),
        Offer(
            name="sql_labels",
            build="loomtune_plugins.data.sql_quiz_data:SqlLabels",
            schema=SqlQuizSettings,
            summary="the same with one query to a question, right or wrong, and its label",
            provides=frozenset({Trait.LABELS, Trait.PROMPTS, Trait.DATABASES}),
        ),
        Offer(
            name="sql_corpus",
            build="loomtune_plugins.data.sql_quiz_data:SqlCorpus",
            schema=SqlCorpusSettings,
            summary="the text on which the shipped base model was pretrained",
            provides=frozenset({Trait.COMPLETIONS, Trait.TEXTS}),
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Wrong queries are made for objectives of pairs or labels; those of completions never look at them."""
    data = next(iter(plan.choices("data").values()), {})
    objective = next(iter(plan.choices("objective").values()), {}).get("name")
    if not data.get("mistakes") or data["name"] != "sql_quiz" or objective not in ("sft", "distill"):
        return []
    what = (
        f"data.mistakes=[{','.join(data['mistakes'])}] is never used: objective={objective} reads right queries alone"
    )
    return [Finding(what, "leave it out, or choose an objective of pairs or labels, such as dpo")]
