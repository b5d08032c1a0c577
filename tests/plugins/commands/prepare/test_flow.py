"""What becomes of every row, and that it is the same however often preparing is broken off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loomtune.errors import RunFailed, UserError
from loomtune_plugins.commands.prepare import writing

MIXED: list[Any] = [*range(40, 240, 2), "a word", *range(41, 140, 3), "\x1b]0;title\x07", 40, 42, 90]
STAGES = ("odd", "apart", "grouped")


def test_the_manifest_accounts_for_every_record(prepared: Callable[..., Any]) -> None:
    manifest = prepared(MIXED, *STAGES).manifest
    read = manifest["read"]
    assert (read["records"], read["rows"]) == (len(MIXED), len(MIXED) - 2)
    assert read["dropped"]["no number"]["rows"] == 2
    rows = read["rows"]
    for stage in manifest["stages"]:
        assert stage["in"] == rows
        rows = stage["out"]
        assert stage["in"] - rows == sum(of["rows"] for of in stage["dropped"].values())
    assert rows == sum(of["rows"] for of in manifest["splits"].values()) == sum(f["rows"] for f in manifest["files"])
    assert manifest["stages"][0]["dropped"]["odd"]["rows"] == sum(point % 2 for point in range(41, 140, 3))


def test_examples_are_the_first_of_their_reason_and_move_no_cursor(prepared: Callable[..., Any]) -> None:
    manifest = prepared(MIXED, *STAGES).manifest
    assert [one["detail"] for one in manifest["read"]["dropped"]["no number"]["examples"]] == [
        "a word",
        "\\x1b]0;title\\x07",
    ]
    odd = manifest["stages"][0]["dropped"]["odd"]["examples"]
    assert [one["excerpt"] for one in odd] == [f'{{"text":"point {point}"}}' for point in range(41, 68, 6)]
    near = manifest["stages"][1]["dropped"]["near another"]["examples"]
    assert near[0]["excerpt"].startswith(r'{"text":"even \u001b[31mpoint 42')
    assert near[0]["detail"] == "train:1 (0.9800)"


def test_what_is_kept_of_dropped_rows_is_all_of_them(prepared: Callable[..., Any]) -> None:
    done = prepared(MIXED, *STAGES, keep_dropped=True)
    told = [(row["origin"], row["stage"]) for row in done.rows("dropped")]
    kept = {row["origin"] for split in ("train", "validation", "test") for row in done.rows(split)}
    assert {origin for origin, _ in told} | kept == {f"train:{number + 1}" for number in range(len(MIXED))}
    assert len(told) + len(kept) == len(MIXED)
    assert list(dict.fromkeys(stage for _, stage in told)) == ["read", "odd", "apart"]


def test_rows_stay_in_the_order_of_the_input(prepared: Callable[..., Any]) -> None:
    points = prepared(range(500, 0, -4), "odd").points()
    assert points == sorted(points, reverse=True)


def test_files_are_of_bounded_size(prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "FILE", 3000)
    points = list(range(0, 1000, 5))
    done = prepared(points, "apart")
    assert len(done.files) > 3
    assert max(map(len, done.files.values())) < 6000
    assert done.points() == points


SAMPLED = [pytest.param(last, marks=() if last in (3, 45) else pytest.mark.slow) for last in (0, 3, 9, 18, 30, 45, 56)]


@pytest.mark.parametrize("last", SAMPLED)
def test_broken_off_anywhere_it_goes_on_to_the_same_bytes(
    prepared: Callable[..., Any], here: Callable[..., Any], tmp_path: Path, last: int
) -> None:
    folder = tmp_path / "work"
    whole = prepared(MIXED, *STAGES, keep_dropped=True)
    with pytest.raises(KeyboardInterrupt):
        prepared(MIXED, *STAGES, keep_dropped=True, folder=folder, engine=here(last))
    for torn in list(folder.glob("*")):
        if torn.is_dir():
            (torn / ".0-torn").mkdir()
            (torn / ".0-torn" / "rows.jsonl").write_text("half a ro")
    again = here()
    assert prepared(MIXED, *STAGES, keep_dropped=True, folder=folder, engine=again) == whole
    fresh = here()
    prepared(MIXED, *STAGES, keep_dropped=True, engine=fresh)
    assert again.done == fresh.done - last


def test_a_piece_that_was_read_in_part_is_read_on(
    prepared: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = prepared(MIXED, "odd"), tmp_path / "work"
    with monkeypatch.context() as patch:
        patch.setattr("loomtune_plugins.commands.prepare.reading.line_of", failing_at(40))
        with pytest.raises(RunFailed, match="No space left"):
            prepared(MIXED, "odd", folder=folder)
    assert sorted(path.name for path in (folder / "rows-0").iterdir()) == ["0-00000"]
    assert prepared(MIXED, "odd", folder=folder) == whole


def failing_at(count: int) -> Callable[[Any], bytes]:
    rows = []

    def line_of(row: Any) -> bytes:
        rows.append(row)
        if len(rows) == count:
            raise OSError("No space left on device")
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"

    return line_of


def test_a_stage_that_fails_names_itself_and_the_row(prepared: Callable[..., Any]) -> None:
    with pytest.raises(RunFailed, match=r"stage=odd failed at train:3: ValueError: unlucky\n +cure: tell the author"):
        prepared([12, 14, 13, 16], "odd")


def test_a_split_that_would_stay_empty_is_refused(prepared: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"stage=grouped: test would have none of all 200 rows, in groups of up to 200"):
        prepared(range(100, 300), ("grouped", {"shares": {"train": 0.9, "test": 0.1}}))


def test_where_training_rows_are_lacking_the_cure_is_one_that_can_be_taken(prepared: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="train would have none") as refused:
        prepared({"train": [1, 2], "test": [1], "validation": [90]}, "grouped")
    assert "give training rows that are not alike" in str(refused.value)
    assert "share to 0" not in str(refused.value)


def test_a_share_far_from_what_was_asked_is_told(prepared: Callable[..., Any]) -> None:
    shares = {"shares": {"train": 0.9, "test": 0.1}}
    telling = []
    for seed in range(4):
        manifest = prepared([*range(60), *range(100, 420, 8)], ("grouped", shares), seed=seed).manifest
        actual = manifest["splits"]["test"]["actual"]
        told = [one["what"] for one in manifest["warnings"] if one["what"].startswith("test has")]
        assert bool(told) == (not 0.05 <= actual <= 0.2)
        assert all(one.startswith(f"test has {actual:.1%} of the rows, and 10.0% was asked for") for one in told)
        telling += told
    assert telling


def test_a_split_of_share_0_may_be_empty(prepared: Callable[..., Any]) -> None:
    done = prepared(range(0, 800, 8), ("grouped", {"shares": {"train": 0.9, "validation": 0.0, "test": 0.1}}))
    assert set(done.manifest["splits"]) == {"train", "test"}


def test_nothing_left_is_refused(prepared: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no row is left"):
        prepared([1, 3, 5], "odd")


def test_no_stage_at_all_keeps_every_row(prepared: Callable[..., Any]) -> None:
    assert prepared({"train": [1, 1, 2], "test": [1]}).manifest["splits"] == {"test": {"rows": 1}, "train": {"rows": 3}}
