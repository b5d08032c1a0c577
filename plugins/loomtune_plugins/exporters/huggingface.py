"""The format of Hugging Face: safetensors files with an index, config and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loomtune.contracts import Exporter, Model
from loomtune.contracts.saved import HEADS, HEADS_FILE, INDEX, index_text, weight_files
from loomtune.errors import UserError
from loomtune_plugins.exporters.settings import HuggingFaceSettings

if TYPE_CHECKING:
    from torch import Tensor


class HuggingFace(Exporter):
    """What `AutoModelForCausalLM.from_pretrained` opens, and `model.path` of the next run."""

    def __init__(self, settings: HuggingFaceSettings) -> None:
        if settings.shard_gigabytes <= 0:
            raise UserError.of(
                f"exporter.huggingface.shard_gigabytes={settings.shard_gigabytes} holds nothing",
                "set exporter.huggingface.shard_gigabytes to a number above 0",
            )
        self._limit = int(settings.shard_gigabytes * 1e9)

    def export(self, model: Model, tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
        """Holds no more than one file's tensors, or one tensor that is larger than a file should be."""
        from safetensors.torch import save_file

        heads: dict[str, Tensor] = {}
        shards: list[list[str]] = []
        total = 0
        for number, shard in enumerate(_shards(_without(heads, tensors), self._limit)):
            save_file(shard, _draft(folder, number), metadata={"format": "pt"})
            shards.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
            shard.clear()  # before the next one is gathered
        _name(folder, shards, total)
        if heads:
            save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
        model.save_config(folder)
        model.tokenizer().save(folder)


def _without(heads: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All but the scalar heads, which are put aside."""
    for name, tensor in tensors:
        if name.startswith(HEADS):
            heads[name] = tensor.contiguous()
        else:
            yield name, tensor.contiguous()


def _shards(tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, as many together as `limit` bytes hold, at least one."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard


def _name(folder: Path, shards: list[list[str]], total: int) -> None:
    """Gives the files the names that loaders look for, which say how many there are."""
    files = weight_files(len(shards))
    for number, file in enumerate(files):
        _draft(folder, number).rename(folder / file)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_text(index_text(places, total), encoding="utf-8")


def _draft(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.part"
