"""What Weights & Biases stores, read back from its own files; nothing leaves this machine."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from loomtune.errors import UserError
from loomtune_plugins.trackers.settings import WandbSettings
from loomtune_plugins.trackers.wandb import Wandb

HEADER, BLOCK, FRAME = 7, 32768, 7


def stored(folder: Path) -> list[list[Record]]:
    """The records of each of wandb's offline runs in a folder, in the order of their start."""
    wandb.teardown()  # its service writes on after a run is finished
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[Record.FromString(data) for data in frames(path.read_bytes())] for path in files]


def frames(data: bytes) -> Iterator[bytes]:
    """Records of wandb's file: LevelDB's log format behind a header of 7 bytes."""
    at, whole = HEADER, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < FRAME:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + FRAME])
        whole += data[at + FRAME : at + FRAME + size]
        at += FRAME + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def history(records: list[Record]) -> list[dict[str, float]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def config(records: list[Record]) -> dict[str, object]:
    found: dict[str, object] = {}
    for record in records:
        for item in [*record.run.config.update, *record.config.update]:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


def identity(records: list[Record]) -> str:
    return next(record.run.run_id for record in records if record.WhichOneof("record_type") == "run")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


def test_a_run_is_stored_whole_and_a_resumed_one_is_the_same_run(story) -> None:
    told = story(wandb=Wandb(WandbSettings(project="looms", tags=["first"], mode="offline")))
    told.evaluated(0, heldout_loss_before=3.0)
    told.step(1)
    told.step(2)
    told.evaluated(2, heldout_loss=1.5)
    told.end()
    again = story(wandb=Wandb(WandbSettings(project="looms", mode="offline")))
    again.loaded(2)
    again.step(3)
    again.end()

    first, second = stored(told.run.folder)
    rows = history(first)
    assert [row["_step"] for row in rows] == [0, 1, 2]
    assert rows[0]["heldout_loss_before"] == 3.0
    assert (rows[2]["loss"], rows[2]["heldout_loss"]) == (2.0, 1.5)
    assert config(first)["steps"] == 4
    assert next(record.run.project for record in first if record.run.project) == "looms"
    assert [row["_step"] for row in history(second)] == [3]
    assert identity(first) == identity(second) == (told.run.folder / "wandb_id").read_text()


def test_secrets_stay_here_and_without_a_key_wandb_is_offline(story, monkeypatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter2-hunter2")
    tracker = Wandb(WandbSettings())
    told = story()
    told.run.plan.settings |= {
        "data": {"api_key": "sk-very-secret", "path": "https://user:hunter2-hunter2@example.org/rows"},
        "evaluator": {"max_tokens": 64},
    }
    tracker.run_started(told.run)
    described = tracker.describe(told.run)
    tracker.run_finished(told.run, "completed")
    (records,) = stored(told.run.folder)
    assert described.startswith(f"wandb sync {told.run.folder}/wandb/offline-run-")
    text = b"".join(path.read_bytes() for path in told.run.folder.rglob("*") if path.is_file())
    assert b"hunter2-hunter2" not in text and b"sk-very-secret" not in text
    assert config(records)["evaluator"] == {"max_tokens": 64}


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"tracker\.wandb\.mode"):
        Wandb(WandbSettings(mode="offlin"))


def test_completions_are_a_table_every_few_steps(story) -> None:
    told = story(wandb=Wandb(WandbSettings(mode="offline", rollouts=2, rollout_every=2)))
    sample = {"prompt": "asked\x1b", "rewards": {"exact": 1.0}, "advantage": 0.5, "ended": True}
    for step in (1, 2, 3):
        samples = [{**sample, "completion": f"said {reward}", "reward": reward} for reward in (0.0, 2.0, 1.0)]
        told.tell("rollout_finished", step=step, samples=samples)
        told.step(step)
    told.end()
    (records,) = stored(told.run.folder)
    tables = [line["rollouts/path"] for line in history(records) if "rollouts/path" in line]
    assert len(tables) == 2
    (files,) = [sorted(told.run.folder.glob("wandb/offline-run-*/files/media/table/*.json"))]
    rows = json.loads(files[0].read_text())["data"]
    assert [row[2] for row in rows] == ["said 2.0", "said 0.0"]
    assert rows[0] == ["1", "asked\\x1b", "said 2.0", "2", "exact: 1", "0.5", "yes"]
