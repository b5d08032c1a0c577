"""Rows from JSON lines and Parquet: the same rows, the same faults, whatever the file."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from loomtune.contracts import Data
from loomtune.errors import UserError
from loomtune_plugins.data.files_settings import FileSettings
from loomtune_plugins.data.jsonl import Jsonl
from loomtune_plugins.data.parquet import Parquet

SHARED = Path(os.environ.get("LOOMTUNE_SHARED", Path(__file__).parents[4] / "shared"))
QA = [{"question": f"q{number}", "answer": f"a{number}", "id": number} for number in range(1, 101)]


def lines(path: Path, records: list[Any]) -> str:
    text = "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    opened: Callable[[Path, str], Any] = {".gz": gzip.open, ".bz2": bz2.open, ".zst": zstandard.open}.get(
        path.suffix, open
    )
    with opened(path, "wb") as file:
        file.write(text.encode())
    return str(path)


def table(path: Path, records: list[dict[str, Any]]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


def jsonl(path: str, **settings: Any) -> Jsonl:
    return Jsonl(FileSettings(path=path, **settings))


def refusal(data: Data) -> str:
    """What the user is told, by `check` where it can be seen at once, and at the latest by reading."""
    with pytest.raises(UserError) as error:
        data.check()
        list(data.rows("train"))
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.bz2", "rows.jsonl.zst"])
def test_columns_are_mapped_and_the_others_ride_along(tmp_path: Path, name: str) -> None:
    data = jsonl(lines(tmp_path / name, QA), prompt="question", completion="answer")
    data.check()
    first, *_, last = data.rows("train")
    assert first == {**QA[0], "prompt": "q1", "completion": "a1", "origin": f"{name}:1"}
    assert last["origin"] == f"{name}:100"


def test_parquet_gives_the_rows_that_json_lines_give(tmp_path: Path) -> None:
    parquet = Parquet(FileSettings(path=table(tmp_path / "rows", QA * 30), prompt="question", completion="answer"))
    parquet.check()
    ours = list(jsonl(lines(tmp_path / "rows.jsonl", QA * 30), prompt="question", completion="answer").rows("train"))
    for row, other in zip(parquet.rows("train"), ours, strict=True):
        assert {**row, "origin": ""} == {**other, "origin": ""}
    assert ours[-1]["origin"] == "rows.jsonl:3000"


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"prompt": "p", "completion": "c", "text": "t"}, {"prompt", "completion"}),
        ({"messages": [{"role": "user", "content": "hi"}], "prompt": "p"}, {"messages"}),
        ({"text": "t"}, {"text"}),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "completion": "c"}, {"prompt", "chosen", "rejected"}),
        ({"prompt": "p"}, {"prompt"}),
        ({"prompt": "p", "completion": "c", "label": 1, "text": "t"}, {"prompt", "completion", "label"}),
        ({"text": "t", "label": "a class, which rides along"}, {"text", "label"}),
        ({"prompt": "p", "completion": "c", "label": "a class"}, {"prompt", "completion", "label"}),
    ],
)
def test_the_format_is_seen_by_the_columns_and_rows_hold_no_other(tmp_path: Path, record: dict, keys: set[str]) -> None:
    data = jsonl(lines(tmp_path / "rows.jsonl", [record]))
    (row,) = data.rows("train")
    assert set(row) == keys | {"origin"}


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet"])
def test_labels_become_true_or_false_whatever_their_column(tmp_path: Path, file: str) -> None:
    said = [{"role": "user", "content": "hi"}]
    records = [{"prompt": said, "completion": said, "good": good} for good in (1, 0)]
    write, read = (lines, Jsonl) if file.endswith("l") else (table, Parquet)
    rows = list(read(FileSettings(path=write(tmp_path / file, records), label="good")).rows("train"))
    assert [(row["label"], row["prompt"], row["completion"]) for row in rows] == [
        (True, said, said),
        (False, said, said),
    ]


@pytest.mark.parametrize("label", ["yes", 2, 0.5, None])
def test_a_label_that_is_none_is_refused_with_its_line(tmp_path: Path, label: Any) -> None:
    good = {"prompt": "a", "completion": "b", "label": True}
    path = lines(tmp_path / "rows.jsonl", [good, {**good, "label": label}, good])
    assert f"{path}:2: 'label' is " in refusal(jsonl(path)) and "not true or false" in refusal(jsonl(path))


def test_both_labels_of_an_answer_are_set_aside_together(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "completion": "c", "label": good} for i in range(40) for good in (True, False)]
    data = jsonl(lines(tmp_path / "rows.jsonl", records), holdout=0.3)
    held = [row["prompt"] for row in data.rows("validation")]
    assert 0 < len(held) < 80 and all(held.count(prompt) == 2 for prompt in held)


def test_a_named_column_decides_the_format(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": "t", "body": "b", "prompt": "p", "completion": "c"}])
    assert next(iter(jsonl(path, text="body").rows("train")))["text"] == "b"
    assert "text" in next(iter(jsonl(path, format="text").rows("train")))


def test_parquet_conversations_lose_their_empty_fields(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "ho", "name": "x"}]
    (row,) = Parquet(FileSettings(path=table(tmp_path / "rows.parquet", [{"messages": said}]))).rows("train")
    assert row["messages"] == [{"role": "user", "content": "hi"}, said[1]]


def test_many_files_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    data = jsonl(f"{tmp_path}/*.jsonl")
    data.check()
    assert [row["text"] for row in data.rows("train")] == ["a", "b", "c"]


def test_empty_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [(row["text"], row["origin"]) for row in jsonl(str(path)).rows("train")] == [
        ("a", "rows.jsonl:1"),
        ("b", "rows.jsonl:3"),
    ]


@pytest.mark.parametrize("settings", [{"holdout": 0.2}, {"holdout_rows": 20}])
def test_rows_set_aside_are_the_same_each_time_and_none_is_in_both(tmp_path: Path, settings: dict) -> None:
    path = lines(tmp_path / "rows.jsonl", QA)
    data = jsonl(path, prompt="question", completion="answer", **settings)
    data.check()
    assert data.splits() == ("train", "validation")
    train, validation = ([row["id"] for row in data.rows(split)] for split in ("train", "validation"))
    assert sorted(train + validation) == list(range(1, 101))
    assert len(validation) == 20 if "holdout_rows" in settings else 10 < len(validation) < 32
    backwards = jsonl(lines(tmp_path / "back.jsonl", QA[::-1]), prompt="question", completion="answer", **settings)
    assert sorted(row["id"] for row in backwards.rows("validation")) == validation


def test_rows_that_say_the_same_are_set_aside_together(tmp_path: Path) -> None:
    twice = [{**record, "id": record["id"] + shift} for record in QA for shift in (0, 1000)]
    data = jsonl(lines(tmp_path / "rows.jsonl", twice), prompt="question", completion="answer", holdout=0.3)
    train, validation = ({row["prompt"] for row in data.rows(split)} for split in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation


def test_limit_holds_for_each_split(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": str(number)} for number in range(50)])
    data = jsonl(path, validation=path, limit=3)
    assert [len(list(data.rows(split))) for split in data.splits()] == [3, 3]


def test_the_fingerprint_follows_contents_and_mapping_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, moved = lines(tmp_path / "rows.jsonl", QA), lines(tmp_path / "other" / "rows.jsonl", QA)
    changed = lines(tmp_path / "changed.jsonl", [*QA[:-1], {**QA[-1], "answer": "b"}])
    assert jsonl(one).fingerprint() == jsonl(moved).fingerprint()
    renamed = lines(tmp_path / "renamed.jsonl", QA)  # rows say where they were read
    variants = [
        jsonl(one),
        jsonl(renamed),
        jsonl(changed),
        jsonl(one, validation=moved),
        jsonl(one, test=moved),
        jsonl(one, limit=3),
    ]
    variants += [jsonl(one, prompt="question"), jsonl(one, prompt="answer"), jsonl(one, holdout=0.1)]
    assert len({data.fingerprint() for data in variants}) == len(variants)


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", QA)
    said = refusal(jsonl(str(tmp_path / "trian.jsonl")))
    assert "Did you mean 'train.jsonl'?" in said
    assert "data.path" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": ""}, ["data.path is not set"]),
        ({"path": "nowhere/rows.jsonl"}, ["there is no folder", "nowhere"]),
        ({"path": "."}, ["is a folder", "'./*'"]),
        ({"format": "chat"}, ["data.format=chat", "messages"]),
        ({"holdout": 1.5}, ["0 <= data.holdout < 1"]),
        ({"holdout": 0.1, "holdout_rows": 3}, ["set only one of them"]),
        ({"validation": "rows.jsonl", "holdout": 0.1}, ["leave out data.validation"]),
        ({"holdout_rows": 100}, ["none of the 100 different rows"]),
        ({"limit": -1}, ["data.limit=-1"]),
        ({"validation": "missing.jsonl", "limit": -1}, ["data.validation=missing.jsonl", "data.limit=-1"]),
        ({"prompt": "qestion", "completion": "answer"}, ["rows.jsonl:1", "Did you mean 'question'?", "data.prompt"]),
        ({"prompt": "", "completion": "answer"}, ["no column 'prompt'", "question, answer, id", "data.prompt="]),
        ({"prompt": "", "completion": ""}, ["no format can be made", "data.prompt=question"]),
        ({"text": "answer"}, ["no format can be made", "data.text=answer"]),
        ({"format": "prompt"}, ["data.completion=answer is never used", "data.format"]),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_key_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "rows.jsonl", QA)
    usual = {"path": "rows.jsonl", "prompt": "question", "completion": "answer"}
    said = refusal(Jsonl(FileSettings(**(usual | settings))))
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"prompt": "a", ', "is no JSON: "),
        ("[1]", "is JSON, but no object"),
        ({"prompt": "a"}, "has no column 'completion'; it has prompt"),
        ({"prompt": "a", "completion": None}, "'completion' is nothing (null), not text"),
        ({"prompt": 7, "completion": "c"}, "'prompt' is a number, not text"),
        ({"prompt": ["a"], "completion": "c"}, "'prompt' is a list, not text"),
    ],
)
def test_a_bad_line_is_named_with_its_fault(tmp_path: Path, record: Any, reason: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    path = lines(tmp_path / "rows.jsonl", [good, record, good])
    assert f"{path}:2: {reason}" in refusal(jsonl(path))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "'messages' is text, not a list of messages"),
        (["hi"], "'messages' message 1 is text, not an object with role and content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "message 2 has nothing (null) as its content"),
    ],
)
def test_a_bad_conversation_is_named_with_its_fault(tmp_path: Path, messages: Any, reason: str) -> None:
    assert reason in refusal(jsonl(lines(tmp_path / "rows.jsonl", [{"messages": messages}])))


def test_faults_beyond_the_first_rows_are_all_counted_and_five_are_told(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": "a"}] * 50 + [{"txt": "a"}] * 7)
    data = jsonl(path)
    data.check()
    said = refusal(data)
    assert "7 rows cannot be read" in said
    assert f"{path}:55: " in said
    assert f"{path}:56: " not in said
    assert "and 2 more" in said


def test_text_that_is_not_utf8_is_a_fault_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe4"}\n')
    assert f"{path}:2: is no UTF-8 text" in refusal(jsonl(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "has no rows"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("array.json", b'[\n{"text": "a"}\n]', "jq -c"),
        ("plain.jsonl.gz", b'{"text": "a"}\n', "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "cannot be read"),
        ("plain.jsonl.bz2", b'{"text": "a"}\n', "cannot be read"),
        ("plain.jsonl.zst", b'{"text": "a"}\n', "cannot be read"),
        ("cut.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 999)[:-3], "ends in the middle"),
        ("rows.parquet", b"PAR1", "data=parquet"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert words in refusal(jsonl(str(path)))


def test_a_file_that_is_no_parquet_says_which_plugin_reads_it(tmp_path: Path) -> None:
    assert "data=jsonl" in refusal(Parquet(FileSettings(path=lines(tmp_path / "rows.jsonl", QA))))


@pytest.mark.skipif(not (SHARED / "data" / "gsm8k").is_dir(), reason="needs ../shared/data/gsm8k")
def test_gsm8k_is_read_by_naming_its_columns() -> None:
    data = jsonl(
        str(SHARED / "data" / "gsm8k" / "train.jsonl"), prompt="question", completion="answer", holdout_rows=100
    )
    data.check()
    train, validation = (list(data.rows(split)) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (7373, 100)
    assert train[0]["prompt"].startswith("Natalia sold clips")
    assert train[0]["completion"].endswith("#### 72")


def test_offers_and_settings_are_known_without_torch_or_pyarrow() -> None:
    program = (
        "import sys, loomtune_plugins.data as data;"
        "import importlib;"
        "[importlib.import_module(offer.build.split(':')[0]) for offer in data.datas()];"
        "names = {offer.name for offer in data.datas()};"
        "assert names >= {'jsonl', 'parquet', 'files', 'datasets', 'prepared', 'oasst', 'sql_quiz', 'sql_corpus'};"
        "sys.exit(bool({'torch', 'pyarrow', 'datasets', 'zstandard'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
