"""Training rows that are read while the run goes on: where reading goes on, what is bad, what a file may not change."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest

from loomtune.contracts import Dropped
from loomtune.errors import UserError
from loomtune_plugins.data.any_files import AnyFiles
from loomtune_plugins.data.any_files_settings import AnyFileSettings
from loomtune_plugins.data.files import Files
from loomtune_plugins.data.hub import Hub
from loomtune_plugins.data.hub_settings import HubSettings
from loomtune_plugins.data.oasst import Oasst
from loomtune_plugins.data.oasst_settings import OasstSettings
from loomtune_plugins.data.prepared import Prepared
from loomtune_plugins.data.prepared_settings import PreparedSettings

ROWS = [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(9)]
RANKED = [{"prompt": f"q{number}", "answers": list("abc")[: 1 + number % 3]} for number in range(6)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, rows: list[Any]) -> None:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def files(folder: Path, **settings: Any) -> AnyFiles:
    given: dict[str, Any] = {"path": f"{folder}/*", "stream": True, "window": 4, **settings}
    return AnyFiles(AnyFileSettings(**given))


def three(folder: Path) -> None:
    """Rows in three files, one of them packed."""
    for number, name in enumerate(["a.jsonl", "b.jsonl.gz", "c.jsonl"]):
        write(folder / name, ROWS[3 * number : 3 * number + 3])


def every_place(data: Files) -> None:
    """What comes after each place, asked of data that another process would have, is what comes next."""
    whole = list(data.stream())
    for number, (_, place) in enumerate(whole):
        kept = json.loads(json.dumps(place))
        assert list(pickle.loads(pickle.dumps(data)).stream(kept)) == whole[number + 1 :]


def test_reading_goes_on_behind_each_row_of_several_files(tmp_path: Path) -> None:
    three(tmp_path)
    data = files(tmp_path)
    data.check()
    assert [row for row, _ in data.stream()] == list(files(tmp_path, stream=False, window=10_000).rows("train"))
    every_place(data)


def test_reading_goes_on_between_rows_that_one_record_gives(tmp_path: Path) -> None:
    write(tmp_path / "ranked.jsonl", RANKED)
    data = files(tmp_path, answers="answers")
    assert len(list(data.stream())) == 8, "1 pair of two answers, 3 of three, none of one: twice"
    every_place(data)
    assert data.left_out("train")[0] == "2 of 6 records of train, as far as they were read, give no row"


def test_a_bad_record_stands_in_its_place_and_ends_nothing(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [ROWS[0], "{nonsense", ROWS[1], {"prompt": 3, "completion": "a"}, ROWS[2]])
    data = files(tmp_path)
    found = [row for row, _ in data.stream()]
    assert [isinstance(row, Dropped) for row in found] == [False, True, False, True, False]
    assert [row.origin for row in found if isinstance(row, Dropped)] == ["rows.jsonl:2", "rows.jsonl:4"]
    every_place(data)


def test_a_limit_counts_rows_wherever_reading_began(tmp_path: Path) -> None:
    three(tmp_path)
    data = files(tmp_path, limit=5)
    assert len(list(data.stream())) == 5
    every_place(data)


def test_nothing_is_read_behind_the_limit(tmp_path: Path) -> None:
    three(tmp_path)
    data = files(tmp_path, limit=3)
    (tmp_path / "c.jsonl").write_text("")
    assert len(list(data.stream())) == 3, "an empty file would be refused"


def test_files_before_the_place_are_not_opened_again(tmp_path: Path) -> None:
    three(tmp_path)
    data = files(tmp_path)
    place = list(data.stream())[5][1]
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[3:6]))
    )
    assert [row["prompt"] for row, _ in data.stream(place)] == ["q6", "q7", "q8"]


def test_rows_that_stream_are_known_by_the_sizes_and_times_of_their_files(tmp_path: Path) -> None:
    three(tmp_path)
    before, path = files(tmp_path).fingerprint(), tmp_path / "a.jsonl"
    found = path.stat()
    path.write_bytes(path.read_bytes().replace(b"q0", b"x0"))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert files(tmp_path).fingerprint() == before, "the contents are not read: `docs/data.md` says so"
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    changed = files(tmp_path).fingerprint()
    write(tmp_path / "d.jsonl", ROWS)
    assert len({before, changed, files(tmp_path).fingerprint(), files(tmp_path, limit=3).fingerprint()}) == 4


def test_other_splits_are_known_by_their_contents(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    three(tmp_path / "train")
    held = tmp_path / "held.jsonl"
    write(held, ROWS)
    before = files(tmp_path / "train", validation=str(held)).fingerprint()
    os.utime(held, (0, 0))
    assert files(tmp_path / "train", validation=str(held)).fingerprint() == before


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"holdout": 0.1}, "none can be set aside"),
        ({"holdout_rows": 2}, "none can be set aside"),
        ({"window": 0}, "data.window=0 holds no row"),
        ({"stream": False}, "data.window=4 is of a stream"),
    ],
)
def test_settings_that_a_stream_cannot_heed_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    three(tmp_path)
    with pytest.raises(UserError, match=told):
        files(tmp_path, **settings).check()


def test_preparation_refuses_to_be_told_to_stream(tmp_path: Path) -> None:
    three(tmp_path)
    with pytest.raises(UserError, match="preparation streams anyway"):
        files(tmp_path).pieces("train")


def hub(path: object, **settings: Any) -> Hub:
    return Hub(HubSettings(path=str(path), stream=True, **settings))


def test_a_saved_data_set_streams(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    data = hub(tmp_path / "saved")
    assert [row["prompt"] for row, _ in data.stream()] == [row["prompt"] for row in ROWS]
    every_place(data)
    before = data.fingerprint()
    os.utime(next((tmp_path / "saved").glob("*.arrow")), (0, 0))
    assert data.fingerprint() != before


def test_trees_stream_too(tmp_path: Path) -> None:
    replies = [{"message_id": f"{n}", "role": "assistant", "text": f"a{n}", "rank": n} for n in range(3)]
    tree = {"prompt": {"message_id": "p", "role": "prompter", "text": "q", "replies": replies}}
    write(tmp_path / "trees.jsonl", [tree, tree])
    data = Oasst(OasstSettings(path=f"{tmp_path}/trees.jsonl", stream=True))
    assert len(list(data.stream())) == 6
    every_place(data)


def test_a_name_on_the_hub_streams_lazily_from_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def generated() -> Any:
        for number, row in enumerate(ROWS * 100):
            taken.append(number)
            yield row

    def load(**asked: Any) -> datasets.IterableDataset:
        assert asked["streaming"] and asked["revision"] == COMMIT and asked["split"] == "train"
        return datasets.IterableDataset.from_generator(generated)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = hub("owner/name", revision=COMMIT)
    assert [row["prompt"] for row, _ in itertools.islice(data.stream(), 5)] == ["q0", "q1", "q2", "q3", "q4"]
    assert len(taken) < 200, "rows are fetched as they are needed"
    assert data.fingerprint() != hub("owner/name", revision=COMMIT[::-1]).fingerprint()


@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, "data.revision is no commit"), ({"revision": "main"}, "data.revision is no commit"),
     ({"revision": COMMIT, "train": "train[:10%]"}, "only a whole one can be streamed")],
)  # fmt: skip
def test_a_name_on_the_hub_that_may_mean_other_rows_tomorrow_is_refused(settings: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        hub("owner/name", **settings).fingerprint()


def test_prepared_rows_stream_as_their_manifest_lists_them(tmp_path: Path) -> None:
    content = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
    about = {"split": "train", "rows": len(ROWS), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "train-00000.jsonl").write_bytes(content)
    (tmp_path / "manifest.json").write_text(
        json.dumps({"format": 1, "files": [{"name": "train-00000.jsonl", **about}]})
    )
    data = Prepared(PreparedSettings(path=str(tmp_path), stream=True, window=4))
    data.check()
    assert [row["prompt"] for row, _ in data.stream()] == [row["prompt"] for row in ROWS]
    every_place(data)
    known = data.fingerprint()
    text = (tmp_path / "train-00000.jsonl").read_bytes()
    (tmp_path / "train-00000.jsonl").write_bytes(text.replace(b"q0", b"x0"))
    again = Prepared(PreparedSettings(path=str(tmp_path), stream=True, window=4))
    assert again.fingerprint() == known, "the manifest says what the files hold"
    with pytest.raises(UserError, match="was changed since it was prepared"):
        list(again.stream())
