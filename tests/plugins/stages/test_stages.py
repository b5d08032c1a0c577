"""Every stage answers for each row by itself, and none of them is of use to a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loomtune.catalogue import installed
from loomtune.compose import compose
from loomtune.errors import UserError
from loomtune.plan import findings, refuse
from loomtune.testing import check_light, check_stage
from services import serving
from support import write_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is a loom?", "completion": "A frame on which cloth is woven from threads.", "origin": "a.jsonl:1"},
    {
        "prompt": "What is a  loom",
        "completion": "A frame on which cloth is woven, from threads.",
        "origin": "a.jsonl:2",
    },
    {"text": "The shuttle carries the weft through the shed, and the reed beats it home.", "origin": "a.jsonl:3"},
    {
        "messages": [{"role": "user", "content": "布是什么？"}, {"role": "assistant", "content": "布是织成的。"}],
        "origin": "b:1",
    },
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}], "origin": "b:2"},
    {"prompt": "Say it.", "chosen": "Good morning to you all.", "rejected": "Good night to you all.", "origin": "c:1"},
    {"prompt": "Say it.", "chosen": "Good night to you all.", "rejected": "Good morning to you all.", "origin": "c:2"},
    {"prompt": "Which?", "answers": ["the first one", "the second one"], "ranks": [2, 1], "origin": "c:3"},
    {"prompt": "Is it?", "completion": "Yes, it is.", "label": True, "origin": "c:4"},
    {"prompt": "Is it?", "completion": "Yes, it is.", "label": False, "origin": "c:5"},
    {"prompt": "", "completion": "", "origin": "c:6"},
    {"prompt": "Only asked.", "origin": "c:7"},
]
"""Rows of every kind, in no order."""


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(
        tmp_path_factory.mktemp("evaluation") / "test.jsonl", [{"question": "What is a loom?", "answer": "Yes"}]
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with serving() as service:
        yield {"url": service.url, "model": "m", "cache": str(tmp_path_factory.mktemp("answers"))}


@pytest.mark.parametrize("name", [one for one in installed().names("stage") if one != "semantic"])
def test_a_stage_keeps_its_contract_on_rows_of_every_kind(name: str, evaluation: Path, model: dict[str, Any]) -> None:
    entry = installed().find("stage", name)
    settings: dict[str, Any] = {"against": [str(evaluation)]} if name == "decontaminate" else {}
    known = {field.name for field in fields(entry.offer.schema)}
    settings |= {**model, **({"rounds": 1} if "rounds" in known else {})} if "url" in known else {}
    stage = installed().build("stage", name, settings)
    stage.check()
    check_stage(stage, ROWS)
    assert stage.versions() is not None and entry.offer.summary


def test_the_stages_that_the_guide_shows_keep_their_contract() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "plugins.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "SameLength" in block)
    shown: dict[str, Any] = {}
    exec(code, shown)
    check_stage(shown["NoLinks"](SimpleNamespace(most=0)), ROWS)
    check_stage(shown["SameLength"](None), ROWS)
    assert len(shown["SameLength"](None).describe([])) == 0


def test_importing_what_offers_stages_is_light() -> None:
    check_light(["loomtune_plugins.stages", "loomtune_plugins.stages.settings"])


def test_a_run_that_names_a_stage_is_told_to_prepare_first(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    plan = compose(["data=jsonl", f"data.path={data}", "stage=[clean,near]", "stage.near.threshold=0.8"])
    with pytest.raises(UserError) as refused:
        refuse(findings(plan, installed()))
    assert "stage=[clean,near] prepares data" in str(refused.value)
    assert "loomtune prepare" in str(refused.value) and "stage=[clean,near]" in str(refused.value)
