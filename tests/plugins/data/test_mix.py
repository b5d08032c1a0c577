"""Several sources in one run: their rows, their shares, and what is told of them by the names that they have there."""

from __future__ import annotations

from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from loomtune import api
from loomtune.compose import compose
from loomtune.contracts import Dropped
from loomtune.errors import UserError
from loomtune_plugins.data.mix import Mix
from loomtune_plugins.data.mix_settings import MixSettings, SourceSettings
from support import write_rows


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    asked = [{"question": f"a{n}?", "answer": f"yes {n}"} for n in range(6)]
    told = [
        {"messages": [{"role": "user", "content": f"b{n}"}, {"role": "assistant", "content": "ok"}]} for n in (1, 2)
    ]
    (tmp_path / "other").mkdir()
    return {
        "a": write_rows(tmp_path / "rows.jsonl", asked),
        "b": write_rows(tmp_path / "other" / "rows.jsonl", told),
        "held": write_rows(tmp_path / "held.jsonl", asked[:2]),
    }


def settings(files: dict[str, Path], temperature: float | None = None, **shares: Any) -> MixSettings:
    a = SourceSettings(path=str(files["a"]), validation=str(files["held"]), prompt="question", completion="answer")
    b = SourceSettings(path=str(files["b"]))
    for key, value in shares.items():
        of, _, name = key.partition("_")
        setattr({"a": a, "b": b}[of], name, value)
    return MixSettings(sources={"b": b, "a": a}, temperature=temperature)


def test_rows_come_source_by_source_in_the_order_of_names_and_say_whose_they_are(files: dict[str, Path]) -> None:
    mix = Mix(settings(files))
    mix.check()
    rows = list(mix.rows("train"))
    assert [row["source"] for row in rows] == ["a"] * 6 + ["b"] * 2
    assert [row["origin"] for row in rows][:1] + [row["origin"] for row in rows][-1:] == [
        "a/rows.jsonl:1",
        "b/rows.jsonl:2",
    ]
    assert rows[0]["completion"] == "yes 0" and rows[-1]["messages"][0]["content"] == "b2"


def test_inputs_are_those_of_all_sources_by_the_names_that_origins_have(files: dict[str, Path]) -> None:
    mix = Mix(settings(files))
    digest = {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert mix.inputs("train") == {"a/rows.jsonl": digest["a"], "b/rows.jsonl": digest["b"]}
    assert mix.inputs("validation") == {"a/held.jsonl": digest["held"]}
    assert {row["origin"].rpartition(":")[0] for row in mix.rows("train")} == {*mix.inputs("train")}


def test_what_is_held_out_is_that_of_all_sources(files: dict[str, Path]) -> None:
    mix = Mix(settings(files))
    assert mix.splits() == ("train", "validation")
    assert [row["source"] for row in mix.rows("validation")] == ["a", "a"]
    both = Mix(settings(files, b_validation=str(files["b"])))
    assert [row["source"] for row in both.rows("validation")] == ["a", "a", "b", "b"]


def test_pieces_are_those_of_every_source(files: dict[str, Path]) -> None:
    with files["b"].open("a") as file:
        file.write("{broken\n")
    mix = Mix(settings(files))
    read = [one for piece in mix.pieces("train") for one in mix.read(piece)]
    assert [one["source"] for one in read if not isinstance(one, Dropped)] == ["a"] * 6 + ["b"] * 2
    assert [isinstance(one, Dropped) for one in read].count(True) == 1
    with pytest.raises(UserError, match="1 row cannot be read"):
        list(mix.rows("train"))


def test_shares_say_nothing_to_preparation(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"data.sources.a.epochs: shares belong to a run; .*\n    cure: leave them out"):
        Mix(settings(files, a_epochs=2.0)).pieces("train")


ROWS = {"a": 900, "b": 100}


@pytest.mark.parametrize(
    ("shares", "visits"),
    [
        ({}, (900, 100)),
        ({"a_weight": 0.7, "b_weight": 0.3}, (700, 300)),
        ({"a_weight": 1.0, "b_weight": 2.0}, (Fraction(1000, 3), Fraction(2000, 3))),
        ({"b_epochs": 2.5}, (900, 250)),
        ({"a_epochs": 0.3, "b_epochs": 1.0}, (270, 100)),
        ({"temperature": 1.0}, (900, 100)),
        ({"temperature": 2.0}, (750, 250)),
    ],
)
def test_shares(shares: dict[str, Any], visits: tuple[float, float], files: dict[str, Path]) -> None:
    mix = Mix(settings(files, **shares))
    mix.check()
    assert tuple(mix.visits(ROWS).values()) == visits


def test_a_high_temperature_evens_sources_out(files: dict[str, Path]) -> None:
    assert list(map(round, map(float, Mix(settings(files, temperature=1e9)).visits(ROWS).values()))) == [500, 500]


@pytest.mark.parametrize("temperature", [0.001, 1e-320])
def test_a_temperature_whose_shares_are_beyond_all_numbers_is_refused(
    temperature: float, files: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=r"temperature=.* is beyond all numbers\n    cure: set data.temperature to"):
        Mix(settings(files, temperature=temperature)).visits(ROWS)


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        (
            {"a_weight": 1.0, "b_weight": 1.0, "b_epochs": 2.0},
            "cure: leave only weights, only epochs, or the temperature",
        ),
        ({"a_epochs": 1.0, "temperature": 2.0}, "several ways: data.sources.a.epochs, data.temperature"),
        ({"a_weight": 1.0}, "a weight: data.sources.a.weight\n    cure: set data.sources.b.weight= too"),
        ({"a_weight": 1.0, "b_weight": 0.0}, "data.sources.b.weight=0 is no share"),
        ({"b_epochs": -1.0}, "data.sources.b.epochs=-1 is no share"),
        ({"temperature": 0.0}, "data.temperature=0 is no share"),
        ({"a_path": "none.jsonl"}, "data.sources.a.path=none.jsonl does not exist"),
        ({"a_stream": True}, "data.sources.a.stream=true: shares are of rows that are there"),
        ({"b_path": ""}, "cure: set data.sources.b.path to a file"),
        ({"b_holdout": 2.0, "a_limit": -1}, "data.sources.b.holdout=2.0 is no share"),
    ],
)
def test_what_is_wrong_is_told_by_its_own_key(shares: dict[str, Any], told: str, files: dict[str, Path]) -> None:
    with pytest.raises(UserError) as caught:
        Mix(settings(files, **shares)).check()
    assert told in str(caught.value)


def test_everything_wrong_is_told_together(files: dict[str, Path]) -> None:
    with pytest.raises(UserError) as caught:
        Mix(settings(files, a_path="none.jsonl", b_holdout=3.0, temperature=-1.0)).check()
    assert len(caught.value.faults) == 3
    with pytest.raises(UserError, match=r"no sources\n    cure: name some: data.sources.NAME.path=FILE"):
        Mix(MixSettings()).check()


def test_a_source_of_which_nothing_is_left_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="source b has no rows to learn from"):
        Mix(settings(files)).visits({"a": 5})


def test_the_rows_digest_knows_names_and_files_and_no_shares(files: dict[str, Path]) -> None:
    plain = Mix(settings(files)).fingerprint()
    assert Mix(settings(files, a_weight=1.0, b_weight=3.0)).fingerprint() == plain
    assert Mix(settings(files, a_limit=3)).fingerprint() != plain
    renamed = settings(files)
    renamed.sources["c"] = renamed.sources.pop("b")
    assert Mix(renamed).fingerprint() != plain


def test_what_gives_no_row_is_told_with_its_source(files: dict[str, Path], tmp_path: Path) -> None:
    ranked = [{"prompt": "p", "answers": ["x", "y"], "ranks": ranks} for ranks in ([0, 1], [1, 1])]
    mix = Mix(settings(files, b_path=str(write_rows(tmp_path / "ranked.jsonl", ranked)), b_format="preference"))
    assert len(list(mix.rows("train"))) == 7
    what, cure = mix.left_out("train")
    assert what == "b: 1 of 2 records of train give no row" and "data.sources.b.min_gap" in cure


def composed(*overrides: str) -> Any:
    return compose(["data=mix", *overrides]).chosen("data")


def test_sources_are_named_on_the_command_line() -> None:
    found = composed("data.sources.mine.path=x.jsonl", "data.sources.mine.weight=2", "data.sources.b.path=y")
    assert found["sources"]["mine"]["path"] == "x.jsonl" and found["sources"]["mine"]["weight"] == 2.0
    assert found["sources"]["b"] == {**found["sources"]["b"], "path": "y", "weight": None, "holdout": 0.0}
    assert composed("data.sources.mine={path: x.jsonl, limit: 3}")["sources"]["mine"]["limit"] == 3


def test_sources_are_named_in_a_config_and_changed_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    text = "defaults: [mix, _self_]\nsources:\n  a: {path: a.jsonl}\n  b: {path: b.csv}\n"
    (tmp_path / "data" / "ours.yaml").write_text(text)
    found = compose(["data=ours", "data.sources.a.limit=9", "data.sources.c.path=c"], [str(tmp_path)]).chosen("data")
    assert {name: (one["path"], one["limit"]) for name, one in found["sources"].items()} == {
        "a": ("a.jsonl", 9),
        "b": ("b.csv", 0),
        "c": ("c", 0),
    }
    (tmp_path / "data" / "ours.yaml").write_text(text.replace("path: b.csv", "pth: b.csv"))
    with pytest.raises(UserError, match="pth"):
        compose(["data=ours"], [str(tmp_path)])


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("data.sources.a.pth=x", "no setting 'data.sources.a.pth'. Did you mean 'data.sources.a.path'?"),
        ("data.sources.a.weight=much", "data.sources.a.weight is Optional[float]: its share"),
        ("data.sources.a={pth: x}", "Key 'pth' not in 'SourceSettings'"),
        ("data.sources.a=x.jsonl", "data.sources.a is a group of the settings path, validation"),
        ("data.source.a.path=x", "Did you mean"),
    ],
)
def test_keys_of_a_source_that_do_not_exist_are_told(typed: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        composed("data.sources.a.limit=1", typed) if typed.startswith("data.sources.a.") else composed(typed)
    assert told in str(caught.value)


def test_a_source_s_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from loomtune_plugins.commands.plugins import plugins

    assert plugins(["data=mix"]) == 0
    shown = capsys.readouterr().out
    assert "sources.NAME.path" in shown and "sources.NAME.weight" in shown and "temperature" in shown


def test_a_run_says_how_often_it_visits_each_source_and_which_too_often(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model.path={tiny_model}", "data=mix", "sharding=single", f"run.dir={tmp_path / 'run'}"]
    given += [f"data.sources.a.path={files['a']}", "data.sources.a.prompt=question", "data.sources.a.completion=answer"]
    given += [f"data.sources.few.path={files['held']}", "data.sources.few.prompt=question"]
    given += ["data.sources.few.completion=answer", "data.sources.few.epochs=9"]
    api.prepare(compose(given))
    told = capsys.readouterr().err
    assert "loomtune: visits of an epoch: 6 to a (6 rows), 18 to few (2 rows)\n" in told
    assert "warning: an epoch visits each of the 2 rows of few 9 times\n    cure: give it a smaller share" in told
    assert "rows of a" not in told
