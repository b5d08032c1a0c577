from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fakes import FakeEngine, full, network, on_ranks, rows, save, saver

from loomtune.checkpoint import Manifest, Reader
from loomtune.checkpoint.reader import MissingTensorError
from loomtune.errors import CheckpointError

UNEVEN = [2, 0, 5]
MAPS = Path("/proc/self/maps")


def save_on(folder: Path, sizes: list[int], servable: Any = None) -> Path:
    def work(world: Any) -> Any:
        one = saver(folder, world)
        one.start(40, {"policy": FakeEngine(network(), rows(world.rank, sizes))}, {}, servable)  # type: ignore[dict-item]
        return one.finish()

    paths = on_ranks(len(sizes), work)
    assert len(set(paths)) == 1, paths
    return Path(paths[0])


def glued(parts: list[dict[str, dict[str, torch.Tensor]]]) -> dict[str, dict[str, torch.Tensor]]:
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensors in parts[0].items():
        held = [part[name] for part in parts if name in part]
        whole[name] = {k: torch.cat([h[k] for h in held]) if v.ndim else v for k, v in tensors.items()}
    return whole


@pytest.mark.parametrize("servable", [None, full()], ids=["weights in parts", "weights in model"])
@pytest.mark.parametrize("sizes", [[1], [1, 1], [1, 3, 2, 2]], ids=["1 rank", "2 ranks", "4 ranks"])
def test_parts_of_three_uneven_ranks_are_read_bit_equal_by_any_number(
    tmp_path: Path, sizes: list[int], servable: Any
) -> None:
    reader = Reader(save_on(tmp_path, UNEVEN, servable))
    parts = [FakeEngine(network(), rows(rank, sizes)).read(reader.read("policy")) for rank in range(len(sizes))]
    loaded, expected = glued(parts), network()
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert loaded[name][key].dtype == tensor.dtype
            assert torch.equal(loaded[name][key], tensor), (name, key)


def test_a_region_may_cut_every_dimension(tmp_path: Path) -> None:
    read = Reader(save_on(tmp_path, UNEVEN)).read("policy")
    where = (slice(1, 4), slice(0, 3), slice(1, 2))
    assert torch.equal(read("block.weight", "exp_avg", where), network()["block.weight"]["exp_avg"][where])


def test_an_empty_region_is_an_empty_tensor(tmp_path: Path) -> None:
    read = Reader(save_on(tmp_path, UNEVEN)).read("policy")
    assert read("embed.weight", "weight", (slice(7, 7), slice(0, 3))).shape == (0, 3)


def test_only_files_that_overlap_are_opened(tmp_path: Path) -> None:
    path = save_on(tmp_path, UNEVEN)
    reader = Reader(path)
    other = path / "optimizer" / "policy-00002.safetensors"
    other.write_bytes(bytes(other.stat().st_size))
    first_rows = (slice(0, 1), slice(0, 3))
    assert torch.equal(
        reader.read("policy")("embed.weight", "weight", first_rows), network()["embed.weight"]["weight"][:1]
    )


def test_a_region_that_nobody_saved_is_refused(tmp_path: Path) -> None:
    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        cut = rows(world.rank, [1, 1, 1])
        one.start(1, {"policy": FakeEngine(network(), cut if world.rank != 1 else lambda shape: None)}, {})  # type: ignore[dict-item]
        return one.finish()

    read = Reader(on_ranks(3, work)[0]).read("policy")
    with pytest.raises(CheckpointError, match=r"only some of weight of policy's norm\.bias"):
        read("norm.bias", "weight", (slice(0, 11),))


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        one.start(1, {"policy": FakeEngine({"w": {"weight": torch.arange(4.0)}})}, {})  # type: ignore[dict-item]
        return one.finish()

    read = Reader(on_ranks(2, work)[0]).read("policy")
    with pytest.raises(CheckpointError, match="overlap"):
        read("w", "weight", None)


def test_ranks_that_disagree_about_a_shape_save_nothing(tmp_path: Path) -> None:
    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        one.start(1, {"policy": FakeEngine({"w": {"weight": torch.zeros(4 + world.rank)}})}, {})  # type: ignore[dict-item]
        return one.finish()

    errors = on_ranks(2, work)
    assert all(
        isinstance(error, CheckpointError) and "disagree about policy/w/weight" in str(error) for error in errors
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_held_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    read = Reader(save_on(tmp_path, UNEVEN)).read("policy")
    with pytest.raises(CheckpointError, match=r"holds no momentum of policy's embed\.weight.*exp_avg_sq") as caught:
        read("embed.weight", "momentum", None)
    assert not isinstance(caught.value, KeyError), "an engine would begin anew without a word"


@pytest.mark.skipif(not MAPS.is_file(), reason="only Linux says what a process has mapped")
def test_files_are_let_go_of_when_a_reader_closes(tmp_path: Path) -> None:
    path = save_on(tmp_path, UNEVEN)
    with closing(Reader(path)) as reader:
        held = FakeEngine(network()).read(reader.read("policy"))
        assert str(path) in MAPS.read_text()
    assert str(path) not in MAPS.read_text()
    assert all(torch.equal(t, held[name][key]) for name, tensors in network().items() for key, t in tensors.items())


def test_opaque_state_is_read_under_its_own_layout_and_refused_under_another(tmp_path: Path) -> None:
    quantised = torch.arange(5, dtype=torch.uint8)

    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        tensors = {"w": {"weight": torch.arange(8.0), "quantised": quantised + world.rank}}
        one.start(1, {"policy": FakeEngine(tensors, rows(world.rank, [1, 1]))}, {})  # type: ignore[dict-item]
        return one.finish()

    read = Reader(on_ranks(2, work)[0]).read("policy")
    assert torch.equal(read("w", "quantised", (slice(4, 8),)), quantised + 1)
    for region in (None, (slice(0, 3),), (slice(2, 6),)):
        with pytest.raises(CheckpointError, match="only under the layout that wrote it"):
            read("w", "quantised", region)


def test_what_a_tensor_is_its_optimizer_says_not_its_shape(tmp_path: Path) -> None:
    """Codes of a quantised moment may have the shape of their parameter and still mean nothing elsewhere."""

    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        tensors = {"w": {"weight": torch.arange(8.0), "quantised": torch.arange(8, dtype=torch.uint8)}}
        one.start(1, {"policy": FakeEngine(tensors, rows(world.rank, [1, 1]))}, {})  # type: ignore[dict-item]
        return one.finish()

    read = Reader(on_ranks(2, work)[0]).read("policy")
    assert len(read("w", "quantised", (slice(0, 4),))) == 4
    with pytest.raises(CheckpointError, match="only under the layout that wrote it"):
        read("w", "quantised", None)


def test_state_of_another_shape_than_was_declared_is_not_saved(tmp_path: Path) -> None:
    tensors = {"w": {"weight": torch.arange(8.0), "exp_avg": torch.zeros(5)}}
    with pytest.raises(AssertionError, match="w/exp_avg is declared to be like its parameter"):
        save(tmp_path, 1, FakeEngine(tensors))
    with pytest.raises(AssertionError, match=r"w has \['momentum'\], which its optimizer does not declare"):
        save(tmp_path, 1, FakeEngine({"w": {"weight": torch.arange(8.0), "momentum": torch.zeros(8)}}))


def test_state_that_was_still_to_be_made_is_told_from_state_that_is_lost(tmp_path: Path) -> None:
    """An expert that met no token yet has no moments, which is no fault; the moments of another that are gone are."""
    tensors = network() | {"expert.weight": {"weight": torch.ones(2, 2)}}
    path = save(tmp_path, 1, FakeEngine(tensors))
    with pytest.raises(MissingTensorError, match=r"no exp_avg of policy's expert\.weight; .* there: weight") as new:
        Reader(path).read("policy")("expert.weight", "exp_avg", None)
    assert isinstance(new.value, KeyError), "by which an engine knows it"
    manifest = Manifest.read(path)
    del manifest.index["policy", "norm.bias", "exp_avg"]
    (path / "manifest.json").unlink()
    manifest.write(path)
    with pytest.raises(CheckpointError, match=r"no exp_avg of policy's norm\.bias") as caught:
        Reader(path).read("policy")("norm.bias", "exp_avg", None)
    assert not isinstance(caught.value, KeyError), "an engine would begin anew without a word"


def test_ranks_without_a_part_do_not_hide_what_others_have(tmp_path: Path) -> None:
    def work(world: Any) -> Any:
        one = saver(tmp_path, world)
        tensors = network() if world.rank else {"scale": {"weight": network()["scale"]["weight"]}}
        one.start(1, {"policy": FakeEngine(tensors, rows(world.rank, [0, 1]))}, {})  # type: ignore[dict-item]
        return one.finish()

    read = Reader(on_ranks(2, work)[0]).read("policy")
    assert torch.equal(read("embed.weight", "exp_avg", None), network()["embed.weight"]["exp_avg"])
