"""Rows of other languages go; what nobody can tell stays."""

from __future__ import annotations

from typing import Any

import pytest

from loomtune.contracts import Dropped, Row
from loomtune.errors import UserError
from loomtune_plugins.stages.language import Language
from loomtune_plugins.stages.settings import LanguageSettings

ENGLISH = "A loom is a device on which cloth is woven while the warp threads are held under tension."
GERMAN = "Ein Webstuhl ist ein Gerät, auf dem Stoff gewebt wird, während die Kettfäden gespannt sind."


def judged(row: dict[str, Any], **settings: Any) -> Row | Dropped:
    stage = Language(LanguageSettings(**settings))
    stage.check()
    return stage.apply([{**row, "origin": "rows.jsonl:4"}])[0]


def test_rows_in_languages_that_are_wanted_stay() -> None:
    assert not isinstance(judged({"prompt": ENGLISH, "completion": ENGLISH}), Dropped)
    assert not isinstance(judged({"text": GERMAN}, keep=["en", "de"]), Dropped)


def test_a_row_in_another_language_goes_and_says_which() -> None:
    dropped = judged({"prompt": GERMAN, "completion": GERMAN})
    assert isinstance(dropped, Dropped)
    assert (dropped.origin, dropped.reason) == ("rows.jsonl:4", "another language")
    assert dropped.detail.startswith("de with ")


def test_short_rows_and_code_stay() -> None:
    assert not isinstance(judged({"prompt": "Guten Tag", "completion": "Wie geht es?"}), Dropped)
    assert not isinstance(judged({"prompt": ENGLISH, "completion": f"```\n{GERMAN * 3}\n```"}), Dropped)
    assert isinstance(judged({"prompt": ENGLISH, "completion": GERMAN * 3}), Dropped)
    assert isinstance(judged({"prompt": "Guten Tag", "completion": "Wie geht es?"}, short=5), Dropped)


def test_what_is_shouted_is_read_as_spoken() -> None:
    shouted = "AMANDA HAD 10 NOTEBOOKS. THIS WEEK, SHE ORDERED 6 MORE. HOW MANY NOTEBOOKS DOES AMANDA HAVE NOW?"
    spoken = "This week, Amanda added 6 notebooks.\nNow, Amanda has 10 + 6 = <<10+6=16>>16 notebooks.\n#### 16"
    assert not isinstance(judged({"prompt": shouted, "completion": spoken}), Dropped)


def test_a_row_goes_only_where_another_language_is_certain() -> None:
    both = {"prompt": ENGLISH, "completion": GERMAN}
    assert isinstance(judged(both), Dropped), "German with 0.76"
    assert not isinstance(judged(both, certainty=0.9), Dropped)
    assert not isinstance(judged(both, keep=["en", "de"]), Dropped)


@pytest.mark.parametrize(
    "code",
    [
        "sudo apt-get install -y libssl-dev && make -j4 && ./configure --prefix=/usr/local",
        "SELECT a.id, b.name FROM tbl_a a JOIN tbl_b b ON a.id = b.id WHERE a.x > 3",
        r"\frac{a}{b} + \int_0^1 x^2 dx = \sum_{i=1}^n \alpha_i \beta_i",
        "Muhammad Abdullah, Giuseppe Verdi, Wolfgang Amadeus Mozart, Nguyen Van Troi",
    ],
)
def test_what_is_of_no_language_stays(code: str) -> None:
    assert not isinstance(judged({"prompt": "", "completion": code}), Dropped)


def test_a_language_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match="no language is called 'english'") as refused:
        judged({"text": ENGLISH}, keep=["english"])
    assert " en," in refused.value.faults[0].cure


@pytest.mark.parametrize(
    ("settings", "key"), [({"keep": []}, "keep"), ({"certainty": 0.0}, "certainty"), ({"short": -1}, "short")]
)
def test_settings_without_sense_are_refused_with_the_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as refused:
        Language(LanguageSettings(**settings))
    assert f"stage.language.{key}" in refused.value.faults[0].cure
