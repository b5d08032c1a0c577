"""The words behind `loomtune prepare`."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune.catalogue import installed
from loomtune.errors import Preempted, RunFailed, UserError
from loomtune_plugins.commands.prepare import engines, folder
from loomtune_plugins.commands.prepare.command import prepare
from loomtune_plugins.commands.prepare.composition import composed
from support import write_rows

DRAW = random.Random(3)
ROWS = [{"prompt": f"{DRAW.getrandbits(200):x}", "completion": f"{DRAW.getrandbits(99):x}"} for _ in range(200)]


@pytest.fixture(autouse=True)
def real(monkeypatch: pytest.MonkeyPatch, here: Callable[..., Any]) -> None:
    """In this process."""
    monkeypatch.setitem(engines.ENGINES, "local", lambda count: here())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [*ROWS, *ROWS[:5], {"prompt": "", "completion": 3}])


def run(*words: Any) -> int:
    return prepare([str(word) for word in words])


def read(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_files_become_three_splits_and_a_manifest(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(rows, "--out", out, "--licence", "CC0", "seed=3", "stage=[clean,exact,split]") == 0
    manifest = read(out)
    assert sorted(written(out)) == [
        "manifest.json",
        "test-00000.jsonl",
        "train-00000.jsonl",
        "validation-00000.jsonl",
    ]
    assert (manifest["format"], manifest["seed"], manifest["licence"]) == (1, 3, "CC0")
    assert [stage["name"] for stage in manifest["stages"]] == ["clean", "exact", "split"]
    assert manifest["stages"][1]["dropped"]["exact duplicate"]["rows"] == 5
    assert manifest["inputs"][0]["name"] == "rows.jsonl"
    assert str(tmp_path) not in json.dumps(manifest)
    said = capsys.readouterr().out
    assert "5 exact duplicate" in said
    assert str(sum(file["rows"] for file in manifest["files"] if file["split"] == "train")) in said


def test_a_bad_record_is_dropped_wherever_it_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n" + "".join(json.dumps(row) + "\n" for row in ROWS) + "[3]\n")
    run(tmp_path / "rows.jsonl", "--out", tmp_path / "out", "stage=[exact]")
    dropped = read(tmp_path / "out")["read"]["dropped"]
    assert {reason: of["examples"][0]["origin"] for reason, of in dropped.items()} == {
        "no JSON": "rows.jsonl:1",
        "no object": "rows.jsonl:202",
    }


def test_a_run_reads_what_was_prepared(rows: Path, tmp_path: Path) -> None:
    run(rows, "--out", tmp_path / "out", "stage=[exact,split]")
    data = installed().build("data", "prepared", {"path": str(tmp_path / "out")})
    data.check()
    splits = {split: list(data.rows(split)) for split in data.splits()}
    assert sum(map(len, splits.values())) == 200
    assert {row["prompt"] for found in splits.values() for row in found} == {row["prompt"] for row in ROWS}


def test_the_same_again_is_already_prepared(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (rows, "--out", tmp_path / "out", "stage=[exact,split]")
    run(*words)
    before = written(tmp_path / "out")
    monkeypatch.setitem(engines.ENGINES, "local", lambda count: pytest.fail("nothing is left to do"))
    assert run(*words) == 0
    assert "already prepared" in capsys.readouterr().out
    assert written(tmp_path / "out") == before


def test_what_was_changed_since_is_prepared_again(rows: Path, tmp_path: Path) -> None:
    words = (rows, "--out", tmp_path / "out", "stage=[exact,split]")
    run(*words)
    before = written(tmp_path / "out")
    (tmp_path / "out" / "train-00000.jsonl").write_text("{}\n")
    run(*words)
    assert written(tmp_path / "out") == before


def test_where_it_runs_changes_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(rows, "--out", tmp_path / "one", "stage=[exact,split]")
    (tmp_path / "moved").mkdir()
    moved = rows.rename(tmp_path / "moved" / rows.name)
    monkeypatch.chdir(moved.parent)
    run(moved.name, "--out", tmp_path / "other", "stage=[exact,split]", "--workers", 7)
    assert written(tmp_path / "one") == written(tmp_path / "other")


def test_a_folder_of_another_preparation_is_left_alone(rows: Path, tmp_path: Path) -> None:
    run(rows, "--out", tmp_path / "out", "stage=[exact]")
    before = written(tmp_path / "out")
    with pytest.raises(UserError, match=r"it differs in stage.exact.case \(there True, here False\)\n") as refused:
        run(rows, "--out", tmp_path / "out", "stage=[exact]", "stage.exact.case=false")
    assert "name another folder" in refused.value.faults[0].cure
    assert written(tmp_path / "out") == before


def test_a_folder_that_holds_something_else_is_refused(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else: train-00000.jsonl"):
        run(rows, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        run(rows, "--out", rows)


def test_two_do_not_prepare_the_same_folder(rows: Path, tmp_path: Path) -> None:
    with folder.locked(tmp_path / "out"), pytest.raises(UserError, match="is being prepared by another process"):
        run(rows, "--out", tmp_path / "out")


def test_work_of_other_settings_is_never_read(
    rows: Path, tmp_path: Path, here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(engines.ENGINES, "local", lambda count: here(3))
        with pytest.raises(KeyboardInterrupt):
            run(rows, "--out", tmp_path / "out", "stage=[exact]", "stage.exact.case=false")
    run(rows, "--out", tmp_path / "out", "stage=[exact]")
    run(rows, "--out", tmp_path / "fresh", "stage=[exact]")
    assert written(tmp_path / "out") == written(tmp_path / "fresh")


def test_inputs_that_change_while_they_are_read_are_told(
    rows: Path, tmp_path: Path, here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changing(here):  # type: ignore[valid-type, misc]
        def carry_out(self, tasks: Any) -> Any:
            for answer in super().carry_out(tasks):
                write_rows(rows, ROWS[: -self.done])
                yield answer

    monkeypatch.setitem(engines.ENGINES, "local", lambda count: Changing())
    with pytest.raises(RunFailed, match="the inputs were changed while they were read"):
        run(rows, "--out", tmp_path / "out", "stage=[exact]")
    assert written_names(tmp_path / "out") == [".work"]


def test_what_differs_from_a_finished_folder_is_said(rows: Path, tmp_path: Path) -> None:
    run(rows, "--out", tmp_path / "out", "stage=[exact]")
    for words, told in (
        (["stage=[exact]", "--licence", "CC0"], "differs only in --licence (there '', here 'CC0')"),
        (["stage=[exact]", "--dropped"], "differs only in --dropped (there False, here True)"),
        (
            ["stage=[clean]", "--licence", "CC0"],
            "--licence (there '', here 'CC0'); stage (there [exact], here [clean])",
        ),
        (["stage=[exact]", "data.prompt=completion"], "differs in settings of data, by which the inputs are read"),
    ):
        with pytest.raises(UserError) as refused:
            run(rows, "--out", tmp_path / "out", *words)
        assert told in str(refused.value)
    write_rows(rows, ROWS[:50])
    with pytest.raises(UserError, match=r"it differs in inputs \(train rows.jsonl\)"):
        run(rows, "--out", tmp_path / "out", "stage=[exact]")


def test_a_finished_folder_is_known_where_nothing_can_be_written(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(rows, "--out", tmp_path / "out", "stage=[exact]")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert run(rows, "--out", tmp_path / "out", "stage=[exact]") == 0
    assert "already prepared" in capsys.readouterr().out


def test_a_folder_whose_lock_cannot_be_written_is_refused(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".work" / "lock").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written into"):
        run(rows, "--out", tmp_path / "out", "stage=[exact]")


@pytest.mark.parametrize("where", ["task", "main"])
def test_a_full_disk_names_the_folder_and_the_cure(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loomtune_plugins.commands.prepare.reading.line_of", full) if where == "task" else None
    monkeypatch.setattr(folder, "publish", full) if where == "main" else None
    with pytest.raises(RunFailed) as failed:
        run(rows, "--out", tmp_path / "out", "stage=[exact]")
    assert f"no room is left in {tmp_path / 'out'}:" in str(failed.value)
    assert "cure: make room there; then the same command goes on" in str(failed.value)


def test_many_losses_are_told_after_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_rows(tmp_path / "rows.jsonl", [*ROWS, *[ROWS[3]] * 60])
    run(inputs, "--out", tmp_path / "out", "stage=[exact]")
    (warning,) = read(tmp_path / "out")["warnings"]
    assert warning["what"].startswith("stage=exact dropped 23.1% of its 260 rows, 60 of them for one row (rows.jsonl:4")
    assert "--dropped" in warning["cure"]
    assert f"warning: {warning['what']}"[:100] in capsys.readouterr().out


def test_a_test_set_of_the_inputs_stays_whole_and_a_share_of_it_cannot_be_drawn(rows: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [*ROWS[:20], *ROWS[:20]])
    run(rows, f"data.test={held}", "--out", tmp_path / "out")
    assert read(tmp_path / "out")["splits"]["test"]["rows"] == 40
    with pytest.raises(UserError, match=r"'stage.split.test=0.3' would be without effect: the inputs have a test"):
        run(rows, f"data.test={held}", "--out", tmp_path / "other", "stage.split.test=0.3")


def test_the_table_is_shown_where_a_split_stays_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_rows(tmp_path / "rows.jsonl", [ROWS[0], *[{**ROWS[0], "completion": f"{n}"} for n in range(9)]])
    with pytest.raises(UserError, match="would have none of all 10 rows"):
        run(inputs, "--out", tmp_path / "out", "stage=[exact,split]")
    said = capsys.readouterr().out
    assert "largest group of rows that hang together: 10" in said
    assert "exact" in said


RECIPE = """# @package _global_
defaults:
  - override /data: files
  - override /stage: [exact, split]
data:
  path: {path}
stage:
  exact:
    case: false
seed: 3
"""


def test_a_preparation_can_be_kept_as_yaml(rows: Path, tmp_path: Path) -> None:
    recipes = tmp_path / "conf" / "recipe"
    recipes.mkdir(parents=True)
    (recipes / "mine.yaml").write_text(RECIPE.format(path=rows))
    (recipes / "few.yaml").write_text("# @package _global_\nstage:\n  exact:\n    case: false\n")
    run("--config-dir", tmp_path / "conf", "recipe=mine", "--out", tmp_path / "out")
    typed = [str(rows), "stage=[exact,split]", "stage.exact.case=false", "seed=3"]
    assert read(tmp_path / "out")["key"] == composed(typed, "", False).key
    usual = composed([str(rows), "recipe=few"], "", False, [str(tmp_path / "conf")]).stages
    assert list(usual) == ["clean", "exact", "near", "split"]
    assert usual["exact"]["case"] is False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_word_that_the_same_command_goes_on(
    rows: Path, tmp_path: Path, here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Leaving(here):  # type: ignore[valid-type, misc]
        def carry_out(self, tasks: Any) -> Any:
            for answer in super().carry_out(tasks):
                os.kill(os.getpid(), number)
                yield answer

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setitem(engines.ENGINES, "local", lambda count: Leaving())
        with pytest.raises(Preempted, match="the same command goes on") as left:
            run(rows, "--out", tmp_path / "out", "stage=[exact]")
    assert left.value.exit_code == 75
    assert signal.getsignal(number) == before
    assert run(rows, "--out", tmp_path / "out", "stage=[exact]") == 0


def test_a_kill_between_two_renames_is_made_good(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (rows, "stage=[exact,split]", "--out")
    run(*words, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_json", failing_for("manifest.json"))
        with pytest.raises(RunFailed):
            run(*words, tmp_path / "out")
    assert "train-00000.jsonl" in written_names(tmp_path / "out")
    run(*words, tmp_path / "out")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def failing_for(name: str) -> Callable[[Path, Any], None]:
    write = folder.write_json

    def write_json(path: Path, value: Any) -> None:
        if path.name == name:
            raise RunFailed("killed")
        write(path, value)

    return write_json


def written_names(out: Path) -> list[str]:
    return [path.name for path in out.iterdir()]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lr=1e-3"], "'optimizer.lr=1e-3' would be without effect: preparing trains nothing"),
        (["objective=dpo"], "'objective=dpo' would be without effect"),
        (["recipe=sql_dpo"], "'recipe=sql_dpo' sets batch, evaluate, evaluator, loss, objective"),
        (["stage=[exact]", "seed=7"], "'seed=7' would be without effect: no stage draws"),
        (["steps=4"], "'steps=4' would be without effect"),
        (["stage=[split,exact]"], "stage=split is followed by exact"),
        (["stage=[exact,near,splti]"], "no stage is called 'splti'. Did you mean 'split'"),
        (["stage.near.treshold=0.5"], "treshold"),
        (["a,b.jsonl"], "'a,b.jsonl' has a comma, by which several names are parted"),
        (["--workers", "-1"], "--workers -1 is no number of processes"),
    ],
)
def test_what_makes_no_sense_is_refused(rows: Path, tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        run(rows, "--out", tmp_path / "out", *words)
    assert told in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_nothing_to_prepare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to prepare"):
        run("--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["a=b.jsonl", "seeds=1.jsonl", "rows,1.jsonl", "what's this.jsonl"])
def test_names_of_files_may_hold_what_settings_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_rows(tmp_path / name, ROWS)
    monkeypatch.chdir(tmp_path)
    run(name, "--out", tmp_path / "out", "stage=[exact]")
    assert read(tmp_path / "out")["read"]["rows"] == 200


def test_a_folder_of_datasets_is_known(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="is a folder of datasets"):
        composed([str(tmp_path / "saved"), str(tmp_path / "x.jsonl")], "", False)


def test_every_setting_of_a_stage_is_in_the_manifest_and_a_path_by_its_name(rows: Path, tmp_path: Path) -> None:
    held = write_rows(
        tmp_path / "held.jsonl", [{"prompt": "eight words that nobody else has said before", "completion": "yes"}]
    )
    run(rows, "--out", tmp_path / "out", "stage=[decontaminate]", f"stage.decontaminate.against=[{held}]")
    (stage,) = read(tmp_path / "out")["stages"]
    assert "held.jsonl" in json.dumps(stage["settings"])
    assert str(tmp_path) not in json.dumps(stage)
    assert stage["fingerprint"]
