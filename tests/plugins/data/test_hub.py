"""Data sets of the library `datasets`: saved on disk, a folder of files, and names on the hub."""

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from loomtune.errors import UserError
from loomtune_plugins.data.hub import Hub
from loomtune_plugins.data.hub_settings import HubSettings

QA = [{"question": f"q{number}", "answer": f"a{number}", "id": number} for number in range(1, 101)]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def hub(path: object, **settings: Any) -> Hub:
    return Hub(HubSettings(path=str(path), prompt="question", completion="answer", **settings))


def refusal(data: Hub) -> str:
    with pytest.raises(UserError) as error:
        data.check()
        list(data.rows("train"))
    return str(error.value)


def ids(data: Hub, split: str) -> list[int]:
    return [row["id"] for row in data.rows(split)]


def test_a_saved_data_set_is_read_as_train(tmp_path: Path) -> None:
    datasets.Dataset.from_list(QA).save_to_disk(tmp_path / "saved", num_shards=3)
    data = hub(tmp_path / "saved")
    data.check()
    assert data.splits() == ("train",)
    first, *_ = data.rows("train")
    assert first == {**QA[0], "prompt": "q1", "completion": "a1", "origin": "train:1"}
    assert ids(data, "train") == list(range(1, 101))


def test_splits_are_named_as_the_library_does(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(QA)
    datasets.DatasetDict({"train": rows, "extra": rows.select(range(5))}).save_to_disk(tmp_path / "saved")
    data = hub(tmp_path / "saved", train="train[:90%]+extra", validation="train[90%:]", test="train[:0]+extra[1:2]")
    data.check()
    assert ids(data, "train") == [*range(1, 91), *range(1, 6)]
    assert ids(data, "validation") == list(range(91, 101))
    assert ids(data, "test") == [2]
    assert "nope" in refusal(hub(tmp_path / "saved", train="nope"))


def test_pieces_are_stretches_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loomtune_plugins.data.hub.PIECE", 300)
    datasets.Dataset.from_list(QA).save_to_disk(tmp_path / "saved")
    data = hub(tmp_path / "saved")
    pieces = data.pieces("train")
    kept = [row for piece in pieces for row in data.read(piece)]
    assert len(pieces) > 3
    assert [(row["id"], row["origin"]) for row in kept] == [(number, f"train:{number}") for number in range(1, 101)]


def test_the_fingerprint_follows_contents_and_splits_not_the_folder(tmp_path: Path) -> None:
    for name, rows in (("one", QA), ("twin", QA), ("other", QA[::-1])):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    one, twin, other = (hub(tmp_path / name).fingerprint() for name in ("one", "twin", "other"))
    assert one == twin
    assert len({one, other, hub(tmp_path / "one", train="train[:50%]").fingerprint()}) == 3


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_folder_of_files_is_read_by_the_library(tmp_path: Path, kind: str) -> None:
    (tmp_path / "set").mkdir()
    rows = datasets.Dataset.from_list(QA)
    (rows.to_json if kind == "json" else rows.to_parquet)(tmp_path / "set" / f"train.{kind}")
    data = hub(tmp_path / "set")
    data.check()
    assert ids(data, "train") == list(range(1, 101))


def test_a_name_on_the_hub_is_asked_for_with_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load(**given: Any) -> Any:
        asked.append(given)
        rows = datasets.Dataset.from_list(QA)
        return rows.to_iterable_dataset() if given.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = hub("owner/name", config="main", revision="abc", train="train[:50%]")
    data.check()
    named = {"path": "owner/name", "name": "main", "revision": "abc"}
    assert asked == [{**named, "split": "train", "streaming": True}]
    assert len(ids(data, "train")) == 100
    assert asked[1] == {**named, "split": "train[:50%]"}


def test_what_cannot_be_found_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert "set data=files" in refusal(hub(tmp_path / "rows.jsonl"))
    assert "neither a folder nor a name on the hub" in refusal(hub(tmp_path / "nowhere"))
    assert "the hub needs a network" in refusal(hub("nobody/nothing"))


def test_a_hub_that_does_not_answer_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = logging.getLogger("huggingface_hub.utils._http")
    logging.getLogger("huggingface_hub.utils").setLevel(logging.NOTSET)

    def load(**_: Any) -> Any:
        requests.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    requests.warning("this is heard")
    told = refusal(hub("nobody/nothing"))
    assert told.count("cure:") == 1 and "HF_HUB_OFFLINE=1" in told and "save_to_disk" in told
    assert [message for message in caplog.messages if "Retrying" in message or "heard" in message] == ["this is heard"]


def test_a_saved_data_set_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(QA).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../data-00000"))
    assert "which is no file of its folder" in refusal(hub(tmp_path / "saved"))


def test_code_that_comes_with_a_data_set_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refusal(hub(tmp_path / "set"))
    assert not (tmp_path / "ran").exists()
