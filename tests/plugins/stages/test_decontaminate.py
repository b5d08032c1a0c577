"""Rows that hold what a model will be evaluated on are found, and the place is named."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from loomtune.contracts import Dropped
from loomtune.errors import UserError
from loomtune_plugins.stages.decontaminate import Decontaminate
from loomtune_plugins.stages.settings import DecontaminateSettings
from support import write_rows

QUESTION = (
    "A weaver has 12 looms; each of them makes 3 yards of cloth an hour. "
    "How many yards do all of them make in a day of eight hours?"
)
ANSWER = "12 looms make 12 * 3 = 36 yards an hour, so in 8 hours they make 36 * 8 = 288 yards."
SHORT = "What holds the warp?"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    rows = [{"id": 1, "question": SHORT, "answer": "A loom"}, {"id": 2, "question": QUESTION, "answer": ANSWER}]
    return write_rows(tmp_path / "test.jsonl", rows)


def stage(*against: Path | str, **settings: Any) -> Decontaminate:
    made = Decontaminate(DecontaminateSettings(against=[str(one) for one in against], **settings))
    made.check()
    return made


def found(made: Decontaminate, **row: Any) -> str:
    (judged,) = made.apply([{**row, "origin": "rows.jsonl:9"}])
    if isinstance(judged, Dropped):
        assert (judged.origin, judged.reason) == ("rows.jsonl:9", "part of an evaluation")
        return judged.detail
    return ""


def test_a_question_alone_gives_a_row_away_and_so_does_an_answer(evaluation: Path) -> None:
    made = stage(evaluation)
    assert found(made, prompt=QUESTION, completion="288") == (
        "test.jsonl:2: a weaver has 12 looms each of them makes 3 yards of cloth"
    )
    assert found(made, text=f"Let us see. {ANSWER}").startswith("test.jsonl:2: ")
    assert found(made, prompt="Go on.", chosen="No.", rejected=ANSWER).startswith("test.jsonl:2: ")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, try this: " + QUESTION}]
    assert found(made, messages=turns).startswith("test.jsonl:2: ")


def test_capitals_and_punctuation_do_not_count(evaluation: Path) -> None:
    assert found(stage(evaluation), prompt=QUESTION.upper().replace(" ", ", "), completion="x")


def test_fewer_words_than_an_n_gram_in_common_are_no_evidence(evaluation: Path) -> None:
    twelve = " ".join(QUESTION.split()[:12])
    assert found(stage(evaluation), prompt=f"{twelve} linen?", completion="x") == ""
    assert found(stage(evaluation, size=12), prompt=f"{twelve} linen?", completion="x")
    assert found(stage(evaluation, size=3), prompt="So a weaver owns looms", completion="x") == ""
    assert found(stage(evaluation, size=3), prompt="So a weaver has 2 looms", completion="x")


def test_a_text_of_few_words_must_be_the_whole_prompt(evaluation: Path) -> None:
    made = stage(evaluation)
    assert found(made, prompt="what holds the warp", completion="A frame") == "test.jsonl:1: the whole prompt"
    assert found(made, prompt="And " + SHORT, completion="A loom") == ""
    assert found(made, prompt="Where is it?", completion="A loom") == "", "a short answer occurs everywhere"


def test_a_text_shorter_than_an_n_gram_must_occur_as_a_whole(tmp_path: Path) -> None:
    made = stage(write_rows(tmp_path / "e.jsonl", [{"q": "Which thread goes through the shed of this loom?"}]))
    assert found(made, prompt="Tell me: which thread goes through the shed of this loom, and why?", completion="x")
    assert found(made, prompt="Tell me which thread goes through the shed of this frame.", completion="x") == ""


def test_a_share_asks_for_more_than_one_n_gram(evaluation: Path) -> None:
    half = " ".join(QUESTION.split()[:16])
    assert found(stage(evaluation, share=0.1), prompt=half, completion="x")
    assert found(stage(evaluation, share=0.8), prompt=half, completion="x") == ""
    assert found(stage(evaluation, share=1.0), prompt=QUESTION, completion="x")


def test_what_many_different_evaluation_texts_share_is_no_evidence(tmp_path: Path) -> None:
    order = "Read the following question with care and then answer it by a single letter in brackets:"
    rows = [{"q": f"{order} {number} {number} {number}"} for number in range(12)]
    prompt = f"{order} is a loom a frame?"
    assert found(stage(write_rows(tmp_path / "e.jsonl", rows)), prompt=prompt, completion="x") == ""
    assert found(stage(tmp_path / "e.jsonl", common=12), prompt=prompt, completion="x")
    same = write_rows(tmp_path / "same.jsonl", [{"q": QUESTION, "n": str(number)} for number in range(12)])
    assert found(stage(same), prompt=QUESTION, completion="x"), "one text in many rows is still one text"


def test_scripts_without_blanks_are_found(tmp_path: Path) -> None:
    text = "织布机是一种织造布料的装置，它在纬纱穿过时使经纱保持张紧。"
    made = stage(write_rows(tmp_path / "e.jsonl", [{"q": text}]))
    assert found(made, prompt=f"请看：{text[3:20]}", completion="x")


def test_files_are_read_whatever_their_format(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    record = {"q": QUESTION}
    pq.write_table(pa.table({"q": [QUESTION]}), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([record]))
    (tmp_path / "c.txt").write_text(f"a line\n{QUESTION}\n")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write("\n" + json.dumps(record) + "\n")
    table = f'id,q\n1,"{QUESTION}"\n'
    (tmp_path / "e.csv").write_text("\ufeff" + table)
    (tmp_path / "f.tsv.bz2").write_bytes(bz2.compress(table.replace(",", "\t", 2).encode()))
    frames = [zstandard.compress(part.encode()) for part in ("\n", json.dumps(record) + "\n")]
    (tmp_path / "g.ndjson.zst").write_bytes(b"".join(frames))
    places = {"a.parquet": 1, "b.json": 1, "c.txt": 2, "d.jsonl.gz": 2, "e.csv": 1, "f.tsv.bz2": 1, "g.ndjson.zst": 2}
    for name, row in places.items():
        assert found(stage(tmp_path / name), prompt=QUESTION, completion="x").startswith(f"{name}:{row}: ")
    assert found(stage(tmp_path), prompt=QUESTION, completion="x").startswith("a.parquet:1: ")
    assert found(stage(tmp_path / "*.txt"), prompt=QUESTION, completion="x").startswith("c.txt:2: ")


def test_an_archive_that_is_cut_short_or_grows_without_end_is_refused(tmp_path: Path) -> None:
    import zstandard

    packed = zstandard.compress(json.dumps({"q": QUESTION}).encode() * 50)
    (tmp_path / "cut.jsonl.zst").write_bytes(packed[:-9])
    with pytest.raises(UserError, match=r"cut\.jsonl\.zst cannot be read: it ends in the middle"):
        stage(tmp_path / "cut.jsonl.zst")
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b" " * (70 << 20)))
    with pytest.raises(UserError, match=r"bomb\.json\.gz cannot be read: it unpacks to more than"):
        stage(tmp_path / "bomb.json.gz")
    (tmp_path / "line.jsonl").write_bytes(b'"' + b"a" * (17 << 20))
    with pytest.raises(UserError, match=r"line\.jsonl cannot be read: a line has more than 16 MiB"):
        stage(tmp_path / "line.jsonl")


def prepared(folder: Path, **splits: str) -> Path:
    for split, text in splits.items():
        write_rows(folder / f"{split}-00000.jsonl", [{"text": text}])
    (folder / "dropped.ndjson").write_text(json.dumps({"row": {"text": ANSWER}}))
    files = [{"split": split, "name": f"{split}-00000.jsonl"} for split in splits]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def test_of_prepared_rows_those_count_that_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    made = stage(prepared(tmp_path / "out", train=ANSWER, test=QUESTION))
    assert found(made, prompt=QUESTION, completion="x").startswith("test-00000.jsonl:1: ")
    assert found(made, prompt="Go on.", completion=ANSWER) == ""
    (tmp_path / "all").mkdir()
    assert found(stage(prepared(tmp_path / "all", train=QUESTION)), prompt=QUESTION, completion="x")
    (tmp_path / "out" / "test-00000.jsonl").unlink()
    with pytest.raises(UserError, match=r"lacks test-00000\.jsonl, which its manifest lists"):
        stage(tmp_path / "out")
    (tmp_path / "all" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json is no manifest of prepared rows"):
        stage(tmp_path / "all")


def test_rows_that_are_held_out_are_what_is_guarded(evaluation: Path) -> None:
    made = stage(evaluation)
    assert found(made, prompt=QUESTION, completion="x", split="train")
    for split in ("validation", "test"):
        assert found(made, prompt=QUESTION, completion="x", split=split) == ""


def test_columns_say_what_is_compared(evaluation: Path) -> None:
    assert found(stage(evaluation, columns=["answer"]), prompt=QUESTION, completion="x") == ""
    with pytest.raises(UserError, match=r"test\.jsonl:1 has no column query"):
        stage(evaluation, columns=["query"])


def test_the_fingerprint_is_that_of_the_contents(evaluation: Path) -> None:
    before = stage(evaluation).fingerprint()
    assert stage(evaluation).fingerprint() == before
    evaluation.write_text(evaluation.read_text().replace("12 looms", "13 looms"))
    assert stage(evaluation).fingerprint() != before
    assert stage(evaluation).memory() > 0


@pytest.mark.parametrize("text", ["{broken", '{"q": "a"}\n[[[', "\udcff"])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"e\.jsonl cannot be read"):
        stage(tmp_path / "e.jsonl")


def test_what_is_no_evaluation_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.bin").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    for wrong in (tmp_path / "e.bin", tmp_path / "missing.jsonl", tmp_path / "*.docx"):
        with pytest.raises(UserError, match="is no evaluation file"):
            stage(wrong)
    with pytest.raises(UserError, match="there is no text in it"):
        stage(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="names no evaluation"):
        stage()


@pytest.mark.parametrize("settings", [{"size": 0}, {"shortest": 0}, {"shortest": 20}, {"share": 1.5}, {"common": -1}])
def test_settings_without_sense_are_refused_with_the_key(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        Decontaminate(DecontaminateSettings(**settings))
    assert f"stage.decontaminate.{next(iter(settings))}" in refused.value.faults[0].cure
