"""Runs beside each other: what differs between them, which is best, and a page that needs nothing beside it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune_plugins.commands.compare import shown
from loomtune_plugins.commands.compare.command import compare
from loomtune_plugins.commands.compare.rows import best, differing, groups, rows
from loomtune_plugins.commands.sweeps.goal import Goal


def run(folder: Path, typed: list[str], loss: float | None, status: str = "completed", **settings: Any) -> Path:
    """A run's folder as it is left, with a curve that falls to its loss."""
    folder.mkdir(parents=True)
    plan = Plan({"seed": 0, "objective": {"name": "sft"}, "optimizer": {"name": "adamw", "lr": 1e-3}} | settings, {})
    (folder / "run.yaml").write_text(Plan(plan.settings, {}, 1, tuple(typed)).dump())
    if loss is not None:
        steps = [{"step": step, "loss": loss + 3 - step, "seconds": 0.5} for step in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
        said = {"status": status, "step": 3, "metrics": {"loss": loss, "score": -loss}, "error": None}
        (folder / "result.json").write_text(json.dumps(said))
    return folder


def test_what_was_typed_for_one_is_compared_with_what_the_others_have_by_default(tmp_path: Path) -> None:
    one = run(tmp_path / "one", ["optimizer.lr=1e-3", "objective=sft"], 2.0)
    other = run(tmp_path / "other", ["optimizer.lr=0.01", "steps=3"], 1.0, optimizer={"lr": 0.01}, steps=3)
    third = run(tmp_path / "third", ["steps=3"], 1.5, steps=3)
    found = rows([one, other, third], Goal())
    assert differing(found) == ["optimizer.lr", "steps"], "`objective=sft` says what the others do by themselves"
    assert [row.setting("optimizer.lr") for row in found] == [0.001, 0.01, 0.001]


def test_the_best_is_so_over_its_seeds_and_only_if_it_went_to_its_end(tmp_path: Path) -> None:
    losses = {("a", 0): 1.0, ("a", 1): 4.0, ("b", 0): 2.0, ("b", 1): 2.2}
    folders = [run(tmp_path / f"{n}{s}", [f"run.name={n}", f"seed={s}"], loss) for (n, s), loss in losses.items()]
    folders.append(run(tmp_path / "pruned", ["run.name=c", "seed=0"], 0.1, "preempted"))
    found = rows(folders, Goal())
    keys = differing(found)
    assert [(one.mean, len(one.values)) for one in groups(found, keys)] == [(2.5, 2), (pytest.approx(2.1), 2)]
    assert best(found, keys, Goal()).folder.name == "b0"
    assert best(found, keys, Goal("loss", "max")).folder.name == "a1"
    assert found[-1].value == pytest.approx(0.1) and found[-1].seconds == 1.5
    assert groups(found, keys)[0].spread == pytest.approx(2.1213203)


def test_runs_that_left_nothing_are_in_the_table_without_numbers(tmp_path: Path) -> None:
    found = rows([run(tmp_path / "one", ["seed=1"], None)], Goal())
    assert (found[0].status, found[0].value, best(found, [], Goal())) == ("unfinished", None, None)


def test_the_command_prints_and_writes_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "run.name='<script>$\\no$ | \"q\" \\\\n\nz'"
    folders = [run(tmp_path / "one", ["seed=1", hostile], 2.0), run(tmp_path / "two", ["seed=2"], 1.0)]
    assert compare([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "Best: two, loss 1" in table and "<script>" in table
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<script>" not in page and "http" not in page and page.count("<svg") == 2
    assert (tmp_path / "out" / "comparison.md").read_text() in table
    assert compare([*map(str, folders), "--metric", "score", "--mode", "min"]) == 0
    assert "Best: one, score -2" in capsys.readouterr().out


def test_the_best_is_a_command_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["optimizer.lr=1e-3", "run.name='it\\'s \"so\"; $(x)'"]
    compare([str(run(tmp_path / "one", typed, 2.0)), "--out", str(tmp_path)])
    said = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert said["overrides"] == typed and shlex.split(said["command"]) == ["loomtune", "train", *typed]
    assert (said["metric"], said["value"]) == ("loss", 2.0)


def test_a_run_is_typed_again_without_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([str(run(tmp_path / "one", ["seed=1", f"run.dir={tmp_path / 'one'}"], 2.0))])
    said = capsys.readouterr().out
    assert "loomtune train seed=1" in said and "run.dir" not in said


def test_what_is_not_finite_is_in_the_table_and_never_best(tmp_path: Path) -> None:
    losses = {
        ("a", 0): float("inf"),
        ("a", 1): 1.0,
        ("b", 0): float("nan"),
        ("b", 1): 1.0,
        ("c", 0): 2.0,
        ("c", 1): 3.0,
    }
    folders = [run(tmp_path / f"{n}{s}", [f"run.name={n}", f"seed={s}"], loss) for (n, s), loss in losses.items()]
    found = rows(folders, Goal())
    keys = differing(found)
    assert best(found, keys, Goal()).folder.name == "c0"
    page = shown.html("all", found, keys, groups(found, keys), Goal())
    assert "<td>inf</td>" in page and page.count("<svg") >= 2


def test_a_metric_of_unknown_direction_is_asked_for_it_by_the_command_s_own_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--mode max"):
        compare([str(run(tmp_path / "one", ["seed=1"], 2.0)), "--metric", "score"])


def test_a_metric_is_plotted_against_numbers_and_names(tmp_path: Path) -> None:
    rates = {"1e-5": 3.0, "1e-3": 1.0}
    folders = [
        run(tmp_path / rate, [f"optimizer.lr={rate}", f"run.name=r{rate}"], loss) for rate, loss in rates.items()
    ]
    found = rows(folders, Goal())
    page = shown.html("both", found, differing(found), [], Goal())
    assert "loss by optimizer.lr" in page and "loss by run.name" in page


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run nor a sweep"):
        rows([tmp_path], Goal())
    with pytest.raises(UserError, match="there is no folder"):
        compare([str(tmp_path / "nothing")])
