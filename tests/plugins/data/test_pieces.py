"""Files in pieces: what preparation keeps of each record, wherever a piece begins, and why it keeps nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loomtune.contracts import Data, Dropped
from loomtune.errors import UserError
from loomtune_plugins.data import scan
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.jsonl import Jsonl
from loomtune_plugins.data.oasst import Oasst
from loomtune_plugins.data.oasst_settings import OasstSettings
from loomtune_plugins.data.parquet import Parquet

QA = [{"question": f"q{number}", "answer": f"a{number}", "id": number} for number in range(1, 101)]


def lines(path: Path, records: Sequence[Any]) -> str:
    said = (one if isinstance(one, str) else json.dumps(one) for one in records)
    path.write_text("".join(f"{line}\n" for line in said))
    return str(path)


def jsonl(path: str, **settings: Any) -> Jsonl:
    return Jsonl(FileSettings(path=path, **settings))


def kept(data: Data, split: str = "train") -> list[Any]:
    """Read as another process would: pieces travel as JSON."""
    pieces = json.loads(json.dumps(data.pieces(split)))
    return [one for piece in pieces for one in data.read(piece)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PIECE", 300)
    monkeypatch.setattr(scan, "_BLOCK", 100)
    scan._scan.cache_clear()


@pytest.mark.usefixtures("small_pieces")
def test_every_row_is_in_one_piece_and_knows_its_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [line for record in QA for line in (record, "")])
    data = jsonl(path, prompt="question", completion="answer")
    assert len(data.pieces("train")) > 10
    assert [row["origin"] for row in kept(data)] == [f"rows.jsonl:{2 * number - 1}" for number in range(1, 101)]
    assert [row["id"] for row in kept(data)] == list(range(1, 101))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_pieces_hold_the_same_rows_however_the_file_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\n".join(json.dumps({"text": "x" * length}) for length in range(200)) + end).encode())
    assert [len(row["text"]) for row in kept(jsonl(str(path)))] == list(range(200))


@pytest.mark.usefixtures("small_pieces")
def test_a_line_longer_than_pieces_is_in_one_of_them(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b" * 2000}, {"text": "c"}])
    assert [row["text"][0] for row in kept(jsonl(path))] == ["a", "b", "c"]


def test_a_file_that_grew_since_its_pieces_were_made_is_refused(tmp_path: Path) -> None:
    data = jsonl(path := lines(tmp_path / "rows.jsonl", [{"text": "a"}]))
    pieces = data.pieces("train")
    lines(Path(path), [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match="was changed while it was read"):
        list(data.read(pieces[0]))


def test_row_groups_are_read_apart_and_number_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loomtune_plugins.data.arrow.PIECE", 1)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(QA), path, row_group_size=30)
    data = Parquet(FileSettings(path=str(path), prompt="question", completion="answer"))
    assert len(data.pieces("train")) == 4
    assert [row["origin"] for row in kept(data)] == [f"rows.parquet:{number}" for number in range(1, 101)]


def test_columns_bear_their_own_keys_and_no_text_is_there_twice(tmp_path: Path) -> None:
    data = jsonl(lines(tmp_path / "rows.jsonl", QA[:1]), prompt="question", completion="answer")
    assert kept(data) == [{"prompt": "q1", "completion": "a1", "id": 1, "origin": "rows.jsonl:1"}]


ASKED = {"prompt": "p", "answers": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("record", "settings", "row"),
    [
        ({**ASKED, "ranks": [2, 1, None]}, {}, {**ASKED, "ranks": [2, 1, None]}),
        ({**ASKED, "scores": [1, 2.5, 3]}, {}, {**ASKED, "scores": [1, 2.5, 3]}),
        ({"p": "p", "best": ["a", "b"]}, {"prompt": "p", "answers": "best"},
         {"prompt": "p", "answers": ["a", "b"], "ranks": [1, 2]}),
        ({"prompt": "p", "said": [{"text": "a", "rank": 2}, {"text": "b", "rank": 1}]},
         {"answers": "said.text", "ranks": "said.rank"}, {"prompt": "p", "answers": ["a", "b"], "ranks": [2, 1]}),
        ({"prompt": "p", "completion": "c", "points": 3}, {"score": "points", "threshold": 2.0},
         {"prompt": "p", "completion": "c", "score": 3, "label": True}),
        ({"text": "t", "label": "a class", "prompt": "p"}, {"text": "text"}, {"text": "t", "label": "a class"}),
        ({"prompt": "p", "x": float("nan"), "y": 1}, {}, {"prompt": "p", "x": None, "y": 1}),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}, {},
         {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}),
    ],
)  # fmt: skip
def test_what_an_objective_would_make_of_a_record_stays_open(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, Any], row: dict[str, Any]
) -> None:
    assert kept(jsonl(lines(tmp_path / "rows.jsonl", [record]), **settings)) == [{**row, "origin": "rows.jsonl:1"}]


def test_turns_that_two_conversations_share_are_their_prompt(tmp_path: Path) -> None:
    asks, *answers = (
        {"role": role, "content": said} for role, said in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
    )
    record = {"chosen": [asks, answers[0]], "rejected": [asks, answers[1]]}
    (row,) = kept(jsonl(lines(tmp_path / "rows.jsonl", [record])))
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([asks], [answers[0]], [answers[1]])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "no object"),
        ('{"prompt": "a", "prompt": "b"}', "a key twice"),
        ({"prompt": "a"}, "no column"),
        ({"prompt": 7, "completion": "b"}, "not the value asked for"),
        (json.dumps({"prompt": "a" * 3000, "completion": "b"}), "too long"),
    ],
)
def test_a_bad_record_is_dropped_for_a_reason_that_can_be_counted(tmp_path: Path, record: Any, reason: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    first, bad, last = kept(jsonl(lines(tmp_path / "rows.jsonl", [good, record, good]), max_record=1000))
    assert isinstance(bad, Dropped) and (bad.origin, bad.reason) == ("rows.jsonl:2", reason)
    assert (first["origin"], last["origin"]) == ("rows.jsonl:1", "rows.jsonl:3")


def test_a_dropped_record_shows_what_there_was_of_it(tmp_path: Path) -> None:
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "x" * 5000, "completion": None, "id": 3, "more": [1]}
    _, dropped = kept(jsonl(lines(tmp_path / "rows.jsonl", [good, bad])))
    assert dropped.row == {"prompt": "x" * 500, "id": 3}
    assert "'completion' is nothing" in dropped.detail


def test_a_file_of_bad_records_alone_gives_them_all(tmp_path: Path) -> None:
    assert [one.reason for one in kept(jsonl(lines(tmp_path / "rows.jsonl", ["{", "}"])))] == ["no JSON"] * 2


def test_a_limit_makes_one_piece_of_the_first_rows_overall(tmp_path: Path) -> None:
    for name in "abc":
        lines(tmp_path / f"{name}.jsonl", ["{", {"text": "x"}, {"text": "y"}])
    data = jsonl(f"{tmp_path}/*.jsonl", limit=3)
    assert len(data.pieces("train")) == 1
    rows = [one for one in kept(data) if not isinstance(one, Dropped)]
    assert [row["origin"] for row in rows] == ["a.jsonl:2", "a.jsonl:3", "b.jsonl:2"]


@pytest.mark.parametrize(
    ("settings", "record", "told"),
    [
        ({"holdout": 0.1}, ASKED, "data.holdout sets rows aside where a run reads them"),
        ({"holdout_rows": 1}, ASKED, "choose a stage that splits"),
        ({"pairs": "best_worst", "answers": "answers"}, ASKED, "data.pairs=best_worst is heeded where a run reads"),
        ({"min_gap": 1.0}, {**ASKED, "ranks": [1, 2, 3]}, "data.min_gap=1.0 is heeded"),
        ({"threshold": 1.0}, {**ASKED, "scores": [1, 2, 3]}, "data.threshold=1.0 is heeded"),
        ({"format": "completion", "answers": "answers"}, ASKED, "data.format=completion, which is made of several"),
        ({"format": "unpaired"}, {"prompt": "p", "chosen": "c", "rejected": "r"}, "data.format=unpaired"),
    ],
)
def test_what_only_a_run_could_heed_is_refused(
    tmp_path: Path, settings: dict[str, Any], record: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as error:
        jsonl(lines(tmp_path / "rows.jsonl", [record]), **settings).pieces("train")
    assert told in str(error.value)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "rows.jsonl", [{"text": folder}])
    data = jsonl(f"{tmp_path}/*/rows.jsonl")
    told = [(folder, f"{folder}/rows.jsonl:1") for folder in "ab"]
    assert [(row["text"], row["origin"]) for row in kept(data)] == told
    assert [(row["text"], row["origin"]) for row in data.rows("train")] == told


def test_ranked_replies_of_a_tree_stay_ranked(tmp_path: Path) -> None:
    def said(role: str, text: str, replies: Sequence[Any] = (), rank: int | None = None) -> dict[str, Any]:
        return {"message_id": text, "role": role, "text": text, "replies": list(replies), "rank": rank}

    tree = said(
        "prompter", "q", [said("assistant", "a", rank=1), said("assistant", "b", rank=0), said("assistant", "c")]
    )
    path = lines(tmp_path / "trees.jsonl", [{"prompt": tree}, {"prompt": said("prompter", "alone")}])
    row, barren = kept(Oasst(OasstSettings(path=path)))
    assert (row["answers"], row["ranks"]) == (["a", "b"], [1, 0])
    assert row["prompt"] == [{"role": "user", "content": "q"}]
    assert (barren.origin, barren.reason) == ("trees.jsonl:2", "gives no row")
    with pytest.raises(UserError, match=r"data.format=unpaired is heeded where a run reads"):
        Oasst(OasstSettings(path=path, format="unpaired")).pieces("train")
