"""Rows in the languages that are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from loomtune.contracts import Dropped, Row, RowStage
from loomtune.contracts.data import sides
from loomtune.errors import UserError, near
from loomtune_plugins.stages.settings import LanguageSettings

READ = 4_000
"""Characters that are looked at: more change nothing, and a page a row would take hours."""


class Language(RowStage):
    """Drops rows of another language, by py3langid, which brings its model along and always says the same.

    Prompt and answer are judged together. Code between ``` is not looked at; rows with few letters beside it stay, and
    so do those of which nobody can be sure.
    """

    def __init__(self, settings: LanguageSettings) -> None:
        if not settings.keep:
            raise UserError.of("stage.language.keep names no language", "set stage.language.keep=[en]")
        if not 0 < settings.certainty <= 1:
            what = f"stage.language.certainty={settings.certainty} does not lie between 0 and 1"
            raise UserError.of(what, "set stage.language.certainty=0.7")
        if settings.short < 0:
            what = f"stage.language.short={settings.short} is negative"
            raise UserError.of(what, "set stage.language.short=40, or 0 to judge every row")
        self._settings = settings

    def check(self) -> None:
        known = _identifier().labels
        for code in self._settings.keep:
            if code not in known:
                what = f"stage.language.keep: no language is called '{code}'.{near(code, known)}"
                raise UserError.of(what, f"choose among {', '.join(sorted(known))}")

    def versions(self) -> Mapping[str, str]:
        return {"py3langid": version("py3langid")}

    def memory(self) -> int:
        return 120 << 20

    def apply(self, rows: Sequence[Row]) -> Sequence[Row | Dropped]:
        return [self._judged(row) for row in rows]

    def _judged(self, row: Row) -> Row | Dropped:
        said = "\n".join("\n".join(sides(row)).split("```")[::2])[:READ]
        # What is shouted is read as spoken: the model knows capitals as those of names and of abbreviations.
        text = "\n".join(line.lower() if line.isupper() else line for line in said.split("\n"))
        if sum(map(str.isalpha, text)) < self._settings.short:
            return row
        found: dict[str, float] = dict(_identifier().rank(text))
        language = max(found, key=found.__getitem__)
        if language in self._settings.keep or found[language] < self._settings.certainty:
            return row
        detail = f"{language} with {found[language]:.2f}"
        return Dropped(str(row.get("origin", "")), "another language", detail, row)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
