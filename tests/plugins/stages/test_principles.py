"""Constitutions: ours, and what is wrong with those of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loomtune.errors import UserError
from loomtune_plugins.stages.principles import OURS, PARTS, Constitution

GOOD = """
critique:
  - {critique: "Is it {a}?", revision: Be kinder.}
choice:
  - {name: kind, question: "Which is kinder?"}
prompts:
  critique: "Now: {critique}"
"""


def written(text: str, folder: Path) -> Constitution:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return Constitution(str(path), "stage.critique.constitution")


@pytest.mark.parametrize("part", PARTS)
def test_ours_has_sixteen_principles_of_each_kind_all_different(part: str) -> None:
    ours = Constitution("", "stage.critique.constitution")
    ours.check(part)
    principles = ours.principles(part)
    assert len(principles) >= 16
    for key in PARTS[part]:
        assert len({one.says[key] for one in principles}) == len(principles)


def test_every_prompt_of_ours_has_its_places(tmp_path: Path) -> None:
    assert OURS.is_file()
    text = Constitution("", "k").prompt("choice", conversation="C", question="Q", a="{b}", b="{question}")
    assert not re.search(r"\{conversation\}|\{a\}", text)
    assert "(A) {b}" in text and "(B) {question}" in text, "what is filled in is not filled again"


def test_a_constitution_of_ones_own_is_read_and_lacks_only_what_ours_lends(tmp_path: Path) -> None:
    mine = written(GOOD, tmp_path)
    mine.check("critique")
    mine.check("choice")
    assert [one.name for one in mine.principles("critique")] == ["1"]
    assert mine.prompt("critique", critique="x") == "Now: x"
    assert mine.prompt("verdict") == Constitution("", "k").prompt("verdict")


def test_other_words_are_another_fingerprint(tmp_path: Path) -> None:
    assert written(GOOD, tmp_path).fingerprint() != written(GOOD.replace("kinder", "wiser"), tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no mapping"),
        ("- a\n- b\n", "holds no mapping"),
        ("critique: [", "is no YAML"),
        ("choice:\n  - {question: q}\n", "no list of principles under 'critique'"),
        ("critique: []\n", "no list of principles under 'critique'"),
        ("critique:\n  - be kind\n", "critique 1 is no principle with critique and revision"),
        ("critique:\n  - {critique: c}\n", "critique 1 has no text as its 'revision'"),
        ("critique:\n  - {critique: c, revision: 3}\n", "critique 1 has no text as its 'revision'"),
        ("critique:\n  - {critique: c, revision: r, revison: s}\n", "Did you mean 'revision'"),
        ("critique:\n  - {critique: c, revision: r}\nchoise: []\n", "'choise', which nothing reads. Did you mean"),
        (
            "critique:\n  - {name: n, critique: c, revision: r}\n  - {name: n, critique: d, revision: s}\n",
            "two principles under 'critique' are called 'n'",
        ),
        (
            "critique:\n  - {critique: c, revision: r}\nprompts: {choice: '{a} or {b}'}\n",
            "lacks {conversation}, {question}",
        ),
        ("critique:\n  - {critique: c, revision: r}\nprompts: {coice: x}\n", "prompts has 'coice'"),
        ("critique:\n  - {critique: c, revision: r}\nprompts: {verdict: 3}\n", "'verdict' is no text"),
    ],
)
def test_a_wrong_file_is_refused_and_told_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as raised:
        written(text, tmp_path).check("critique")
    assert "stage.critique.constitution" in str(raised.value)


def test_a_missing_and_an_endless_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Constitution(str(tmp_path / "none.yaml"), "k").check("critique")
    with pytest.raises(UserError, match="more than"):
        written("critique: # " + "x" * (1 << 20), tmp_path).check("critique")
