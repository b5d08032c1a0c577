"""Files of every kind give the same rows; what each kind says differently is told."""

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from loomtune.contracts import Dropped
from loomtune.errors import UserError
from loomtune_plugins.data import json_values
from loomtune_plugins.data.any_files import AnyFiles
from loomtune_plugins.data.any_files_settings import AnyFileSettings

QA = [{"question": f"q{number}, ü", "answer": f'a "{number}"\nb', "id": number} for number in range(1, 51)]


def table(records: Sequence[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().encode()


def arrow(records: Sequence[dict[str, Any]], begin: Callable[..., Any]) -> bytes:
    sink, found = pa.BufferOutputStream(), pa.Table.from_pylist(list(records))
    with begin(sink, found.schema) as writer:
        writer.write_table(found, 10)
    return sink.getvalue().to_pybytes()


def parquet(records: Sequence[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(records)), sink)
    return sink.getvalue().to_pybytes()


LINES = "".join(f"{json.dumps(record)}\n" for record in QA).encode()
KINDS = {
    "rows.jsonl": LINES,
    "rows.NDJSON": LINES,
    "rows.json": json.dumps(QA, indent=1).encode(),
    "one-after-another.json": LINES,
    "rows.csv": table(QA),
    "rows.tsv": table(QA, "\t"),
    "rows.parquet": parquet(QA),
    "rows.arrow": arrow(QA, pa.ipc.new_file),
    "stream.arrow": arrow(QA, pa.ipc.new_stream),
}
PACK = {"": lambda content: content, ".gz": gzip.compress, ".BZ2": bz2.compress, ".zst": zstandard.compress}


def files(path: object, **settings: Any) -> AnyFiles:
    return AnyFiles(AnyFileSettings(path=str(path), **settings))


def refusal(data: AnyFiles) -> str:
    with pytest.raises(UserError) as error:
        data.check()
        list(data.rows("train"))
    return str(error.value)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", KINDS)
def test_a_name_says_how_a_file_is_read(tmp_path: Path, name: str, packed: str) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](KINDS[name]))
    data = files(path, prompt="question", completion="answer")
    data.check()
    asked = [(record["question"], record["answer"], str(record["id"])) for record in QA]
    assert [(row["prompt"], row["completion"], str(row["id"])) for row in data.rows("train")] == asked
    kept = [row for piece in data.pieces("train") for row in data.read(piece)]
    assert [(row["prompt"], row["completion"], str(row["id"])) for row in kept] == asked
    assert [row["origin"] for row in kept] == [row["origin"] for row in data.rows("train")]


def test_names_and_patterns_of_any_kind_are_read_in_their_order_and_each_once(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "c, d.jsonl").write_text('{"text": "c"}\n')
    data = files(f"{tmp_path}/b.jsonl, {tmp_path}/*.csv,{tmp_path}/b*")
    data.check()
    assert [row["text"] for row in data.rows("train")] == ["b", "a"]
    assert [row["text"] for row in files(tmp_path / "c, d.jsonl").rows("train")] == ["c"]
    assert "gone.jsonl does not exist" in refusal(files(f"{tmp_path}/b.jsonl,{tmp_path}/gone.jsonl"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rows.txt", "is of no known kind"),
        ("rows", "is of no known kind"),
        ("rows.jsnl", "Did you mean '.json"),
        ("rows.jsonl.gz.gz", "is an archive in an archive"),
    ],
)
def test_a_name_that_says_nothing_is_refused(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    assert told in refusal(files(tmp_path / name)) and ".parquet" in refusal(files(tmp_path / name))


def test_cells_are_text_but_for_what_is_never_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    said = [{"role": "user", "content": "hi"}]
    path.write_bytes(table([{"messages": json.dumps(said), "id": "007"}]))
    assert [(row["messages"], row["id"]) for row in files(path).rows("train")] == [(said, "007")]
    path.write_bytes(
        table([{"prompt": "7", "completion": "[1]", "good": good} for good in ("True", "false", "1", "0")])
    )
    rows = list(files(path, label="good").rows("train"))
    assert [row["label"] for row in rows] == [True, False, True, False]
    assert {(row["prompt"], row["completion"]) for row in rows} == {("7", "[1]")}
    path.write_bytes(table([{"prompt": "p", "answers": '["a", "b"]', "scores": "[1, 2.5]"}]))
    assert [(row["chosen"], row["margin"]) for row in files(path).rows("train")] == [("b", 1.5)]


def test_cells_are_separated_by_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(table(QA, ";"))
    rows = list(files(tmp_path / "rows.csv", delimiter=";", prompt="question", completion="answer").rows("train"))
    assert len(rows) == 50
    assert "question;answer;id" in refusal(files(tmp_path / "rows.csv", prompt="question", completion="answer"))
    assert "data.delimiter=';;' is not one character" in refusal(files(tmp_path / "rows.csv", delimiter=";;"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("prompt,completion\na,b\na\n", "rows.csv:3: has 1 cells, and the header has 2"),
        ("prompt,completion\na,b\na,b,c\n", "rows.csv:3: has 3 cells, and the header has 2"),
        ('prompt,completion\na,b\n"a"b,c\n', "rows.csv:3: is no table of text"),
        ('prompt,completion\na,"b\nb"\n\na\n', "rows.csv:5: has 1 cells"),
        ("prompt,prompt\na,b\n", "the header has a name twice"),
        ("prompt,\na,b\n", "the header has a name twice, or an empty one"),
        ("prompt,completion\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_table_that_is_none_is_told_with_its_line(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    assert told in refusal(files(tmp_path / "rows.csv"))


def test_bad_lines_of_a_table_do_not_take_others_with_them(tmp_path: Path) -> None:
    content = b'prompt,completion\na,1\n"\xff\n",2\nc,"' + b"x" * 2000 + b'"\nd,4\n'
    (tmp_path / "rows.csv").write_bytes(content)
    data = files(tmp_path / "rows.csv", max_record=1000)
    found = [one for piece in data.pieces("train") for one in data.read(piece)]
    told = [(one.origin, one.reason) if isinstance(one, Dropped) else one["completion"] for one in found]
    assert told == ["1", ("rows.csv:3", "no UTF-8 text"), ("rows.csv:5", "too long"), "4"]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_an_array_is_read_a_window_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_values, "_BLOCK", block)
    records: list[Any] = [{"text": 'a\\"]},{ü'}, 12345, {"text": "b", "more": [{"a": []}]}, {"text": 7}]
    (tmp_path / "rows.json").write_text(f"\ufeff {json.dumps(records, indent=2, ensure_ascii=False)} \n", "utf-8")
    data = files(tmp_path / "rows.json")
    found = [one for piece in data.pieces("train") for one in data.read(piece)]
    told = [one.reason if isinstance(one, Dropped) else one["text"] for one in found]
    assert told == ['a\\"]},{ü', "no object", "b", "not the value asked for"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"text": "a"}', "rows.json:2: has neither ',' nor ']' before it"),
        ('[{"text": "a"} {"text": "b"}]', "neither ',' nor ']'"),
        ('[{"text": "a"},]', "rows.json:2: is no JSON"),
        ('[{"text": "a"}, {"text": ', "rows.json:2: is no JSON"),
        ('[{"text": "a"}] {}', "stands after the end of the array"),
        ("hello", "rows.json:1: is no JSON"),
        ("[]", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_an_array_that_is_none_is_told_with_the_record_where_it_ends(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert told in refusal(files(tmp_path / "rows.json"))


def test_dates_and_bytes_of_a_column_are_kept_as_text(tmp_path: Path) -> None:
    from datetime import date

    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet([{"text": "t", "day": date(2026, 1, 2), "raw": b"\x00\xff"}]))
    data = files(path)
    (row,) = [one for piece in data.pieces("train") for one in data.read(piece)]
    assert (row["day"], row["raw"]) == ("2026-01-02", "AP8=")


def test_text_of_a_column_that_is_no_utf8_is_dropped_by_itself(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), tmp_path / "rows.parquet")
    data = files(tmp_path / "rows.parquet")
    found = [one for piece in data.pieces("train") for one in data.read(piece)]
    assert [getattr(one, "reason", "a row") for one in found] == ["a row", "no UTF-8 text", "a row"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_text_of_wide_letters_is_refused_with_the_command_that_rewrites_it(
    tmp_path: Path, name: str, encoding: str, packed: str
) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](KINDS[name].decode().encode(encoding)))
    told = refusal(files(path, prompt="question", completion="answer"))
    known = encoding.upper().replace("-BE", "BE").replace("-LE", "LE")
    assert told.count("cure:") == 1 and f"iconv -f {known} -t UTF-8" in told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "text\nnaïve\n"),
        ("rows.csv", "têxt\nx\n"),
        ("rows.jsonl", '{"text": "naïve"}\n'),
        ("rows.json", '[{"text": "naïve"}]'),
    ],
)
def test_bytes_of_another_encoding_are_told_with_the_command_that_rewrites_it(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    assert "iconv -f LATIN1 -t UTF-8" in refusal(files(tmp_path / name))


@pytest.mark.parametrize(
    "content", ['"prompt";"completion"\n"a";"b"\n', 'prompt;completion\n"a";"b"\n', "prompt;completion\na;b\n"]
)
def test_a_table_with_other_separators_is_told_to_say_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    assert "set data.delimiter" in refusal(files(tmp_path / "rows.csv"))
    assert len(list(files(tmp_path / "rows.csv", delimiter=";").rows("train"))) == 1


@pytest.mark.parametrize("columns", [{}, {"prompt": "question", "completion": "answer"}, {"format": "text"}])
def test_an_object_that_holds_the_rows_in_a_list_is_refused_with_the_command_that_takes_them_out(
    tmp_path: Path, columns: dict[str, str]
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": "1.1", "data": QA}))
    assert f"jq -c '.data[]' {path} > {tmp_path}/rows.jsonl" in refusal(files(path, **columns))
    path.write_text(json.dumps({"my rows": QA}))
    assert "jq -c '.[\"my rows\"][]' " in refusal(files(path, **columns))
    path.write_text(json.dumps({"dialogue": [{"role": "user", "content": "a"}]}))
    assert "jq" not in refusal(files(path, **columns))


def test_so_is_one_too_large_to_be_read_as_a_record(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"data": QA * 999}))
    assert "jq -c '.data[]' " in refusal(files(tmp_path / "rows.json", max_record=1000))
