import json
import os
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from checkpoint_fakes import Alone, FakeAdapter, FakeEngine, equal, full, network, on_ranks, rows, save, saver
from safetensors.torch import load_file

from loomtune.checkpoint import Reader, Servable, latest
from loomtune.checkpoint import saver as saver_module
from loomtune.errors import CheckpointError, LeaseLost


@pytest.mark.parametrize("background", [True, False], ids=["in a thread", "at once"])
def test_what_changes_after_start_does_not_leak_in(tmp_path: Path, background: bool) -> None:
    tensors, state = network(), {"order": [1, 2]}
    one = saver(tmp_path, background=background)
    one.start(40, {"policy": FakeEngine(tensors)}, state, full())  # type: ignore[dict-item]
    for parameter in tensors.values():
        for tensor in parameter.values():
            tensor.fill_(-1)
    state["order"].append(3)
    reader = Reader(one.finish() or tmp_path)
    assert equal(FakeEngine(network()).read(reader.read("policy")), network())
    assert reader.state == {"step": 40, "order": [1, 2]}


def test_training_goes_on_while_a_thread_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = Event(), saver_module.write_tensors
    monkeypatch.setattr(saver_module, "write_tensors", lambda *a: may_write.wait(60) and write(*a))
    one = saver(tmp_path, background=True)
    assert not one.ready()
    one.start(40, {"policy": FakeEngine(network())}, {})  # type: ignore[dict-item]
    assert not one.ready()
    assert latest(tmp_path) is None
    may_write.set()
    assert one.finish() == latest(tmp_path) == tmp_path / "step-00000040"
    assert not one.ready()


def test_nothing_started_is_nothing_to_finish(tmp_path: Path) -> None:
    assert saver(tmp_path).finish() is None


def test_an_error_of_one_thread_is_raised_on_every_rank_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = save(tmp_path, 10), saver_module.write_tensors

    def broken(path: Path, tensors: Any) -> Any:
        if path.name == "policy-00001.safetensors":
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(saver_module, "write_tensors", broken)

    def work(world: Any) -> Any:
        one = saver(tmp_path, world, background=True)
        one.start(20, {"policy": FakeEngine(network(), rows(world.rank, [1, 1, 1]))}, {})  # type: ignore[dict-item]
        return one.finish()

    errors = on_ranks(3, work)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all("rank 1: OSError" in str(error) and "cure: " in str(error) for error in errors)
    assert latest(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000010"]


def test_a_folder_that_cannot_be_written_is_said_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file, not a folder: the one obstacle that stops root as well")
    with pytest.raises(CheckpointError, match=r"rank 0: (NotADirectory|FileExists)Error(.|\n)*may be written to"):
        save(tmp_path / "checkpoints", 10)


def test_files_that_rank_0_cannot_see_are_not_committed(tmp_path: Path) -> None:
    def work(world: Any) -> Any:
        one = saver(tmp_path / f"node{world.rank}", world)
        one.start(20, {"policy": FakeEngine(network(), rows(world.rank, [1, 1]))}, {})  # type: ignore[dict-item]
        return one.finish()

    errors = on_ranks(2, work)
    assert all("is missing" in str(error) and "shared by all nodes" in str(error) for error in errors)


def test_a_superseded_attempt_commits_nothing_on_any_rank(tmp_path: Path) -> None:
    before = save(tmp_path, 10)

    def lost() -> None:
        raise LeaseLost("another attempt writes")

    def work(world: Any) -> Any:
        one = saver(tmp_path, world, lease=lost)
        one.start(20, {"policy": FakeEngine(network(), rows(world.rank, [1, 1]))}, {})  # type: ignore[dict-item]
        return one.finish()

    assert all(isinstance(error, LeaseLost) for error in on_ranks(2, work))
    assert latest(tmp_path) == before
    assert not (tmp_path / "step-00000020").exists()


def test_weights_are_stored_once(tmp_path: Path) -> None:
    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        engines = {name: FakeEngine(network(), rows(world.rank, [1, 1])) for name in ("policy", "value")}
        one.start(5, engines, {}, full())  # type: ignore[arg-type]
        return one.finish()

    path = on_ranks(2, work)[0]
    keys = {file.stem: set(load_file(file)) for file in (path / "optimizer").iterdir()}
    assert not any(key.endswith("/weight") for key in keys["policy-00000"] | keys["policy-00001"])
    assert "embed.weight/weight" in keys["value-00000"]
    assert len(list((path / "model").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("saves_base", [True, False], ids=["beside the model", "beside the adapter"])
def test_scalar_heads_lie_in_a_file_of_their_own_and_come_back(tmp_path: Path, saves_base: bool) -> None:
    tensors = network() | {"heads.value.weight": {"weight": torch.ones(1, 3), "exp_avg": torch.full((1, 3), 2.0)}}
    servable = Servable(role="policy", adapter=FakeAdapter(saves_base), base="base", describe=lambda folder: None)  # type: ignore[arg-type]

    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        one.start(5, {"policy": FakeEngine(tensors, rows(world.rank, [0, 1]))}, {}, servable)  # type: ignore[dict-item]
        return one.finish()

    path = on_ranks(2, work)[0]
    folder = path / ("model" if saves_base else "adapter")
    assert torch.equal(load_file(folder / "heads.safetensors")["heads.value.weight"], torch.ones(1, 3))
    others = {
        key for file in path.rglob("*.safetensors") if file.name != "heads.safetensors" for key in load_file(file)
    }
    assert {key for key in others if "heads" in key} == {"heads.value.weight/exp_avg"}, "each number is stored once"
    read = Reader(path).read("policy")
    assert torch.equal(read("heads.value.weight", "weight", None), torch.ones(1, 3))
    assert torch.equal(read("heads.value.weight", "exp_avg", None), torch.full((1, 3), 2.0))


def test_an_adapter_gets_what_it_added_and_trained_and_no_other_part_of_the_base(tmp_path: Path) -> None:
    trained = {name: {"weight": torch.ones(2, 2)} for name in ("woven.q.lora_A", "woven.embed.weight")}
    frozen = {"woven.q.weight": torch.ones(4, 4), "woven.q.lora_frozen": torch.ones(1)}
    one = saver(tmp_path)
    servable = Servable(role="policy", adapter=FakeAdapter(False), base="org/base", describe=lambda folder: None)
    one.start(5, {"policy": FakeEngine(trained, buffers=frozen)}, {}, servable)  # type: ignore[dict-item]
    path = one.finish() or tmp_path
    assert (path / "adapter" / "names.txt").read_text() == "woven.q.lora_A woven.embed.weight woven.q.lora_frozen"
    assert (path / "adapter" / "adapter_config.json").read_text() == "org/base"
    assert not (path / "model").exists()
    assert torch.equal(Reader(path).read("policy")("woven.q.lora_A", "weight", None), torch.ones(2, 2))


def test_every_file_is_on_the_disk_before_its_folder_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        events.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    one = saver(tmp_path)
    one.start(7, {"policy": FakeEngine(network())}, {}, full(describe=lambda f: (f / "config.json").write_text("{}")))  # type: ignore[dict-item]
    path = one.finish() or tmp_path
    draft = tmp_path / "step-00000007.tmp-a1-1"
    commit = events.index(f"{draft.name} -> {path.name}")
    inside = [path, *path.rglob("*")]
    assert {str(draft / part.relative_to(path)) for part in inside} <= set(events[:commit])
    assert str(tmp_path) in events[commit:], "the folder of the new name"


def test_a_checkpoint_is_safetensors_and_json_without_any_pickle(tmp_path: Path) -> None:
    one = saver(tmp_path)
    one.start(7, {"policy": FakeEngine(network())}, {"seed": 1}, full())  # type: ignore[dict-item]
    path = one.finish() or tmp_path
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) == 4
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix == ".safetensors"
            assert load_file(file)


def test_the_core_of_checkpoints_knows_no_pickle() -> None:
    folder = Path(saver_module.__file__).parent
    for source in folder.glob("*.py"):
        text = source.read_text()
        assert "import pickle" not in text and "torch.load" not in text and "torch.save" not in text


def test_the_library_reads_every_type_that_is_written(tmp_path: Path) -> None:
    from loomtune.checkpoint.files import TYPES, digest, write_tensors

    tensors = {f"{dtype}": torch.tensor([[1, 0, 1]]).to(dtype) for dtype in TYPES}
    tensors |= {"none": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "odd": torch.ones(3, dtype=torch.uint8)}
    written = write_tensors(tmp_path / "all.safetensors", tensors)
    read = load_file(tmp_path / "all.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k].float(), v.float()) and read[k].dtype == v.dtype for k, v in tensors.items())
    assert written == digest(tmp_path / "all.safetensors")


def test_slow_ranks_are_waited_for_with_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[Any] = []
    may_write, write = Event(), saver_module.write_tensors
    monkeypatch.setattr(saver_module, "PATIENCE", 0.01)
    monkeypatch.setattr(saver_module, "write_tensors", lambda *a: may_write.wait(60) and write(*a))

    class Watching(Alone):
        def gather(self, thing: Any) -> list[Any]:
            signs.append(thing)
            if len(signs) == 3:
                may_write.set()
            return [thing]

    one = saver(tmp_path, Watching(), background=True)
    one.start(1, {"policy": FakeEngine(network())}, {})  # type: ignore[dict-item]
    assert one.finish() is not None
    assert signs[:3] == [None] * 3 and signs[-1] is not None
