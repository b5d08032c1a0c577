"""A folder of prepared rows is what its manifest says, or it is refused."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from loomtune.errors import UserError
from loomtune_plugins.data.prepared import Prepared
from loomtune_plugins.data.prepared_settings import PreparedSettings

RANKED = {"prompt": "p", "answers": ["a", "b", "c"], "ranks": [2, 1, 3], "origin": "raw.csv:7"}
ROWS = [RANKED, {"prompt": "q", "completion": "c", "origin": "raw.jsonl:1"}, {"text": "t", "origin": "raw.jsonl:9"}]


def prepare(folder: Path, splits: Mapping[str, Sequence[Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    entries = []
    for split, rows in splits.items():
        content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        name = f"{split}-00000.jsonl"
        (folder / name).write_bytes(content)
        about = {"rows": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        entries.append({"split": split, "name": name, **about})
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path / "prepared", {"train": ROWS, "test": ROWS[1:2]})


def prepared(folder: Path | str, **settings: Any) -> Prepared:
    return Prepared(PreparedSettings(path=str(folder), **settings))


def refusal(folder: Path | str) -> str:
    data = prepared(folder)
    with pytest.raises(UserError) as error:
        data.check()
        list(data.rows("train"))
    return str(error.value)


def test_splits_are_those_of_the_manifest_and_rows_say_where_they_came_from(folder: Path) -> None:
    data = prepared(folder)
    data.check()
    assert data.splits() == ("train", "test")
    assert [row["origin"] for row in data.rows("train")] == ["raw.csv:7"] * 3 + ["raw.jsonl:1", "raw.jsonl:9"]
    assert next(iter(data.rows("test"))) == ROWS[1]


def test_rankings_become_what_the_run_asks_for(folder: Path) -> None:
    def made(**settings: Any) -> list[tuple[str, str]]:
        rows = prepared(prepare(folder, {"train": [RANKED]}), **settings).rows("train")
        return [(row["chosen"], row["rejected"]) for row in rows]

    assert made() == [("b", "a"), ("b", "c"), ("a", "c")]
    assert made(pairs="adjacent") == [("b", "a"), ("a", "c")]
    assert made(min_gap=2.0) == [("b", "c")]


def test_rows_of_several_formats_are_not_all_read_as_one(folder: Path) -> None:
    with pytest.raises(UserError, match="into a folder of their own"):
        list(prepared(folder, format="preference").rows("train"))


def test_prepared_rows_can_be_prepared_again(folder: Path) -> None:
    data = prepared(folder)
    assert [row for piece in data.pieces("train") for row in data.read(piece)] == ROWS


def test_the_fingerprint_is_of_the_manifest_and_the_settings_not_of_the_folder(folder: Path, tmp_path: Path) -> None:
    twin, other = (
        prepare(tmp_path / "twin", {"train": ROWS, "test": ROWS[1:2]}),
        prepare(tmp_path / "o", {"train": ROWS}),
    )
    assert prepared(folder).fingerprint() == prepared(twin).fingerprint()
    assert (
        len({prepared(folder).fingerprint(), prepared(other).fingerprint(), prepared(folder, limit=1).fingerprint()})
        == 3
    )


def grown(folder: Path) -> None:
    with (folder / "train-00000.jsonl").open("a") as file:
        file.write("{}\n")


def edited(folder: Path) -> None:
    path = folder / "train-00000.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"t"', b'"u"'))


def gone(folder: Path) -> None:
    (folder / "test-00000.jsonl").unlink()


def added(folder: Path) -> None:
    (folder / "train-00001.jsonl").write_text("{}\n")


def linked(folder: Path) -> None:
    path = folder / "train-00000.jsonl"
    path.rename(folder.parent / "elsewhere.jsonl")
    path.symlink_to(folder.parent / "elsewhere.jsonl")


def unfinished(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-9])


def of_another_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (grown, "train-00000.jsonl was changed since it was prepared: it has"),
        (edited, "train-00000.jsonl was changed since it was prepared"),
        (gone, "test-00000.jsonl is gone since it was prepared"),
        (added, "train-00001.jsonl was not there when"),
        (linked, "train-00000.jsonl is no file of this folder: it leads out of it"),
        (unfinished, "holds no manifest.json"),
        (torn, "manifest.json is no manifest of prepared data: is no JSON"),
        (of_another_format, "manifest.json is no manifest of prepared data: is of another format"),
    ],
)
def test_what_was_changed_since_is_named(folder: Path, change: Callable[[Path], None], told: str) -> None:
    change(folder)
    assert told in refusal(folder)


@pytest.mark.parametrize("name", ["../elsewhere.jsonl", "/etc/passwd", "a/../../b.jsonl", "..", "", "a\0b", 7])
def test_a_manifest_that_climbs_out_of_its_folder_is_refused(folder: Path, name: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["name"] = name
    path.write_text(json.dumps(manifest))
    assert "which is no file of its folder" in refusal(folder)


def test_rows_edited_without_a_change_of_size_are_not_fingerprinted(folder: Path) -> None:
    edited(folder)
    with pytest.raises(UserError, match="was changed since it was prepared"):
        prepared(folder).fingerprint()


def test_a_path_that_is_not_set_or_no_folder_is_told(tmp_path: Path) -> None:
    assert "data.path is not set" in refusal("")
    assert "holds no manifest.json" in refusal(tmp_path / "nowhere")
