import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fakes import Alone, FakeEngine, full, network, on_ranks, save, saver

from loomtune.checkpoint import Reader, latest, validate
from loomtune.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    one = saver(tmp_path)
    one.start(40, {"policy": FakeEngine(network())}, {"samples": 320}, full())  # type: ignore[dict-item]
    return one.finish() or tmp_path


def load(path: Path) -> Any:
    reader = Reader(path)
    return reader.state, FakeEngine(network()).read(reader.read("policy"))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_any_flipped_bit_of_any_file_is_noticed(path: Path) -> None:
    draw = random.Random(0)
    for file in (file for file in path.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        for bit in [0, len(whole) * 8 - 1, *(draw.randrange(len(whole) * 8) for _ in range(40))]:
            flip(file, bit)
            with pytest.raises(CheckpointError, match=file.name):
                load(path)
            file.write_bytes(whole)
    assert load(path)[0]["samples"] == 320


def test_a_flipped_bit_is_named_with_its_cure_on_every_rank(path: Path) -> None:
    file = path / "model" / "model.safetensors"
    flip(file, file.stat().st_size * 8 - 5)
    errors = on_ranks(3, lambda world: Reader(path, world))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all(str(file) in str(error) and "cure: restore the file, or move" in str(error) for error in errors)


def test_ranks_share_the_comparing_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loomtune.checkpoint import reader as module

    compared: list[str] = []
    verify = module.verify
    monkeypatch.setattr(
        module, "verify", lambda path, name, manifest: (compared.append(name), verify(path, name, manifest))
    )
    readers = on_ranks(3, lambda world: Reader(path, world))
    assert sorted(compared) == sorted(readers[0].manifest.files)
    readers[2].read("policy")("scale", "weight", None)
    assert len(compared) == len(readers[0].manifest.files), "nothing is compared twice"


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model/model.safetensors"])
def test_a_missing_file_is_noticed_before_anything_is_read(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=r"is missing|has no manifest"):
        Reader(path)


def test_a_file_that_was_cut_off_is_noticed_before_anything_is_read(path: Path) -> None:
    file = path / "optimizer" / "policy-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"policy-00000\.safetensors has \d+ bytes instead of"):
        Reader(path)


def test_deep_validation_compares_digests_and_the_shallow_does_not(path: Path) -> None:
    flip(path / "model" / "model.safetensors", 700)
    validate(path)
    with pytest.raises(CheckpointError, match="sha256"):
        validate(path, deep=True)
    assert latest(path.parent) == path
    assert latest(path.parent, deep=True) is None


def test_a_damaged_newest_gives_way_to_the_one_before_and_is_named(tmp_path: Path, capsys: Any) -> None:
    before, newest = save(tmp_path, 10), save(tmp_path, 20)
    (newest / "state.json").unlink()
    assert latest(tmp_path) == before
    assert "checkpoint step-00000020 is skipped" in capsys.readouterr().err


def test_folders_of_different_saves_cannot_be_mixed(tmp_path: Path) -> None:
    one, other = save(tmp_path, 10), save(tmp_path, 20)
    shutil.copy(other / "optimizer" / "policy-00000.safetensors", one / "optimizer")
    with pytest.raises(CheckpointError, match="sha256"):
        load(one)


def resealed(path: Path, change: Any) -> None:
    """Changes a manifest as an attacker would, who can compute digests."""
    from loomtune.checkpoint.manifest import _seal

    body = json.loads((path / "manifest.json").read_text())
    body.pop("sha256")
    change(body)
    (path / "manifest.json").write_text(json.dumps({"sha256": _seal(body), **body}))


@pytest.mark.parametrize("name", ["../other/state.json", "/etc/passwd"])
def test_a_manifest_cannot_reach_out_of_its_folder(path: Path, name: str) -> None:
    resealed(path, lambda body: body["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        Reader(path)


def test_a_piece_in_a_file_that_is_not_listed_is_refused(path: Path) -> None:
    def change(body: Any) -> None:
        body["tensors"]["policy"]["scale"]["weight"]["pieces"][0][0] = "../../elsewhere.safetensors"

    resealed(path, change)
    with pytest.raises(CheckpointError, match="elsewhere"):
        Reader(path)


def test_a_manifest_of_another_format_is_refused_by_its_version(path: Path) -> None:
    resealed(path, lambda body: body.update(version=2))
    with pytest.raises(CheckpointError, match="has format loomtune-checkpoint 2"):
        Reader(path)


def test_the_manifest_says_where_every_tensor_is(path: Path) -> None:
    manifest = validate(path)
    assert (manifest.step, manifest.run, manifest.attempt, manifest.world_size) == (40, "run-hash", "a1", 1)
    entry = manifest.index["policy", "embed.weight", "exp_avg"]
    assert (entry.shape, entry.dtype, entry.key) == ((7, 3), "BF16", "embed.weight/exp_avg")
    assert entry.pieces == [("optimizer/policy-00000.safetensors", (0, 0), (7, 3))]
    assert manifest.index["policy", "embed.weight", "weight"].pieces[0].file == "model/model.safetensors"


def test_a_world_of_one_verifies_as_well(path: Path) -> None:
    flip(path / "state.json", 9)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        Reader(path, Alone())  # type: ignore[arg-type]


def test_a_reader_without_a_world_verifies_before_the_first_read_only(path: Path) -> None:
    reader = Reader(path)
    read = reader.read("policy")
    first = read("scale", "weight", None)
    flip(path / "optimizer" / "policy-00000.safetensors", 4000)
    assert torch.equal(read("scale", "weight", None), first)
    with pytest.raises(CheckpointError, match="policy-00000"):
        read("scale", "exp_avg", None)
